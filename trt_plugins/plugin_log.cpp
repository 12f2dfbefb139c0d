#include "plugin_log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "tensorrt_logger.h"

namespace stts {
namespace {

constexpr int32_t kErrorSeverity = 1;

std::atomic<void*> logger_finder{nullptr};
std::atomic<int32_t> tensorrt_major{0};

// The major version of the library that holds the virtual function table of `object`, 0 if unknown.
int32_t majorVersionBehind(const void* object) noexcept {
    using GetVersion = int32_t (*)();
    const void* table = *static_cast<void* const*>(object);
    Dl_info library{};
    if (dladdr(table, &library) == 0) return 0;
    void* handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return 0;
    void* symbol = dlsym(handle, "getInferLibVersion");
    const int32_t version = symbol == nullptr ? 0 : reinterpret_cast<GetVersion>(symbol)();
    dlclose(handle);
    return version / 10000;
}

template <class Finder>
bool logThrough(void* finder, const char* message) {
    auto* logger = static_cast<Finder*>(finder)->findLogger();
    if (logger == nullptr) return false;
    logger->log(kErrorSeverity, message);
    return true;
}

bool logToTensorRT(const char* message) noexcept {
    void* finder = logger_finder.load();
    if (finder == nullptr) return false;
    // findLogger may throw, and nothing may be thrown into TensorRT.
    try {
        const int32_t major = tensorrt_major.load();
        if (major == 10) return logThrough<LoggerFinder10>(finder, message);
        if (major >= 11) return logThrough<LoggerFinder11>(finder, message);
    } catch (...) {
    }
    return false;
}

}  // namespace

void logError(const char* format, ...) noexcept {
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (!logToTensorRT(message)) std::fprintf(stderr, "%s\n", message);
}

void rememberLoggerFinder(void* finder) noexcept {
    logger_finder.store(nullptr);
    if (finder == nullptr) return;
    tensorrt_major.store(majorVersionBehind(finder));
    logger_finder.store(finder);
}

}  // namespace stts
