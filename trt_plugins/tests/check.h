// Checks for test programs: a failed one is printed, and makes the program exit with 1.
#pragma once

#include <cstdio>

namespace stts {

inline int failed_checks = 0;

inline bool check(bool condition, const char* text, const char* file, int line) {
    if (!condition) {
        ++failed_checks;
        std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
    }
    return condition;
}

inline int exitCode() {
    std::printf("%d checks failed\n", failed_checks);
    return failed_checks == 0 ? 0 : 1;
}

}  // namespace stts

#define CHECK(condition) ::stts::check((condition), #condition, __FILE__, __LINE__)
