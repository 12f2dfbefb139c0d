// Drives the creator that a registry has loaded, as TensorRT does when it saves and reads an
// engine: build-phase plugin -> fields to serialise -> run-time plugin -> the same fields. Called
// by test_registry.py through ctypes, in the process of a real registry.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "tensorrt.h"

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

namespace {

#define REQUIRE(condition)                                                          \
    if (!(condition)) {                                                             \
        std::fprintf(stderr, "probe: failed, line %d: %s\n", __LINE__, #condition); \
        return 1;                                                                   \
    }

const PluginFieldCollection* serialized(nvinfer1::IPluginV3* plugin) {
    using nvinfer1::PluginCapabilityType;
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return runtime == nullptr ? nullptr : runtime->getFieldsToSerialize();
}

bool isRefill(const PluginFieldCollection* fields, int32_t refill) {
    return fields != nullptr && fields->nbFields == 1 &&
           std::strcmp(fields->fields[0].name, "refill") == 0 &&
           fields->fields[0].type == PluginFieldType::kINT32 && fields->fields[0].length == 1 &&
           *static_cast<const int32_t*>(fields->fields[0].data) == refill;
}

int roundTrip(nvinfer1::IPluginCreatorV3One& creator, int32_t refill) {
    const PluginField field("refill", &refill, PluginFieldType::kINT32, 1);
    PluginFieldCollection given{};
    given.nbFields = 1;
    given.fields = &field;
    auto* built = creator.createPlugin("layer", &given, TensorRTPhase::kBUILD);
    REQUIRE(built != nullptr);
    REQUIRE(isRefill(serialized(built), refill));
    auto* loaded = creator.createPlugin("layer", serialized(built), TensorRTPhase::kRUNTIME);
    REQUIRE(loaded != nullptr);
    delete built;
    auto* copy = loaded->clone();
    REQUIRE(copy != nullptr);
    delete loaded;
    REQUIRE(isRefill(serialized(copy), refill));
    delete copy;
    return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int probe(const char* library) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    REQUIRE(handle != nullptr);
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    auto get_creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    REQUIRE(get_creators != nullptr);
    int32_t count = 0;
    auto* const* creators = get_creators(count);
    REQUIRE(count == 1);
    REQUIRE(std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    auto& creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators[0]);
    return roundTrip(creator, 0) + roundTrip(creator, 1);
}
