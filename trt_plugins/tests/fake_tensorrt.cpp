// The logger of a TensorRT, as a shared library: FAKE_TENSORRT_VERSION 10 or 11 has our declaration
// of that generation's layout, 0 that of the real headers.
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if FAKE_TENSORRT_VERSION == 0
#include <NvInferRuntime.h>
#define FAKE_LIBRARY_VERSION NV_TENSORRT_VERSION
using Severity = nvinfer1::ILogger::Severity;
using nvinfer1::ILogger;
using nvinfer1::ILoggerFinder;
#else
#include "interface/NvInferPluginInterface.h"
#define FAKE_LIBRARY_VERSION (FAKE_TENSORRT_VERSION * 10000 + 100)
enum class Severity : int32_t { kERROR = 1 };

#if FAKE_TENSORRT_VERSION >= 11
class Versioned : public nvinfer1::IVersionedInterface {
  public:
    nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"fake", 1, 0}; }
};
class ILogger : public Versioned {
  public:
    virtual void log(Severity severity, const char* message) noexcept = 0;
};
class ILoggerFinder : public Versioned {
  public:
    virtual ILogger* findLogger() = 0;
};
#else
class ILogger {
  public:
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};
class ILoggerFinder {
  public:
    virtual ILogger* findLogger() = 0;
    virtual ~ILoggerFinder() = default;
};
#endif
#endif

namespace {

char last_message[512] = "";
bool throws = false;

class Logger final : public ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity == Severity::kERROR) {
            std::strncpy(last_message, message, sizeof last_message - 1);
        }
    }
};

class Finder final : public ILoggerFinder {
  public:
    ILogger* findLogger() override {
        if (throws) throw std::runtime_error("no logger");
        return &logger_;
    }

  private:
    Logger logger_;
};

}  // namespace

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

FAKE_EXPORT int32_t getInferLibVersion() noexcept {
    return static_cast<int32_t>(FAKE_LIBRARY_VERSION);
}

FAKE_EXPORT void* fakeLoggerFinder() {
    static Finder finder;
    return static_cast<ILoggerFinder*>(&finder);
}

FAKE_EXPORT const char* fakeLastMessage() { return last_message; }

FAKE_EXPORT void fakeClear(bool throws_from_now_on) {
    last_message[0] = '\0';
    throws = throws_from_now_on;
}
