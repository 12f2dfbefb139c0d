// ILogger and ILoggerFinder of TensorRT 10 and of TensorRT 11, which derives them from
// IVersionedInterface: its virtual functions, the destructor among them, come before theirs. A
// library that serves both declares both, and asks the running TensorRT which generation it is.
// tests/plugin_log_test.cpp holds these against the real headers.
//
// Not in an anonymous namespace: there the compiler could see that nothing derives from them, and
// would call the pure virtual functions.
#pragma once

#include <cstdint>

#include "tensorrt.h"

namespace stts {

class Logger10 {
  public:
    virtual void log(int32_t severity, const char* message) noexcept = 0;

  protected:
    ~Logger10() = default;
};

class LoggerFinder10 {
  public:
    virtual Logger10* findLogger() = 0;

  protected:
    ~LoggerFinder10() = default;
};

class Logger11 : public nvinfer1::IVersionedInterface {
  public:
    virtual void log(int32_t severity, const char* message) noexcept = 0;
};

class LoggerFinder11 : public nvinfer1::IVersionedInterface {
  public:
    virtual Logger11* findLogger() = 0;
};

}  // namespace stts
