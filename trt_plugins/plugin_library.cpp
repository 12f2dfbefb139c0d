// What libstts_plugins.so shows to TensorRT (IPluginRegistry::loadLibrary) and to our Python code.
#include <cstdint>

#include "plugin_log.h"
#include "select_pack/select_pack_creator.h"
#include "tensorrt.h"

#ifndef STTS_PLUGINS_VERSION
#error "define STTS_PLUGINS_VERSION, the project's version, as a string"
#endif

#define STTS_EXPORT extern "C" __attribute__((visibility("default")))

STTS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static stts::SelectPackCreator select_pack;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&select_pack};
    count = 1;
    return creators;
}

// `finder` is an nvinfer1::ILoggerFinder, whose layout depends on the TensorRT that calls.
STTS_EXPORT void setLoggerFinder(void* finder) { stts::rememberLoggerFinder(finder); }

STTS_EXPORT const char* sttsPluginsVersion() { return STTS_PLUGINS_VERSION; }
