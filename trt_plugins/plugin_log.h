// Messages of the plugins, through TensorRT's logger when TensorRT has told where it is.
#pragma once

namespace stts {

// Logs an error, printf style. Goes to stderr when no logger is known.
[[gnu::format(printf, 1, 2)]] void logError(const char* format, ...) noexcept;

// `finder` is an nvinfer1::ILoggerFinder of the TensorRT that loads this library, or null.
void rememberLoggerFinder(void* finder) noexcept;

}  // namespace stts
