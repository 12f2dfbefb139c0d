// A plugin library that shows what plugin_log.cpp makes of the finder that a real registry hands
// over. Loaded by test_registry.py, asked through ctypes.
#include "plugin_log.cpp"
#include "tensorrt.h"

#define PROBE extern "C" __attribute__((visibility("default")))

namespace {

// The registry wants one.
class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3* createPlugin(const char* /*name*/,
                                      const nvinfer1::PluginFieldCollection* /*fields*/,
                                      nvinfer1::TensorRTPhase /*phase*/) noexcept override {
        return nullptr;
    }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
    const char* getPluginName() const noexcept override { return "SttsProbe"; }
    const char* getPluginVersion() const noexcept override { return "1"; }
    const char* getPluginNamespace() const noexcept override { return "stts"; }

  private:
    nvinfer1::PluginFieldCollection fields_{0, nullptr};
};

}  // namespace

PROBE nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

PROBE void setLoggerFinder(void* finder) { stts::rememberLoggerFinder(finder); }

PROBE bool hasFinder() { return stts::logger_finder.load() != nullptr; }

PROBE int32_t finderMajor() { return stts::tensorrt_major.load(); }

PROBE bool reachesLogger() { return stts::logToTensorRT("a message of the probe"); }
