// Opens one of the libraries made of fake_tensorrt.cpp.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace stts {

class FakeTensorRT {
  public:
    explicit FakeTensorRT(const char* path) : library_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (library_ == nullptr) {
            std::fprintf(stderr, "%s\n", dlerror());
            std::abort();
        }
    }

    void* finder() const { return function<void* (*)()>("fakeLoggerFinder")(); }
    const char* lastMessage() const { return function<const char* (*)()>("fakeLastMessage")(); }
    void clear(bool throws = false) const { function<void (*)(bool)>("fakeClear")(throws); }

  private:
    template <class Function>
    Function function(const char* name) const {
        return reinterpret_cast<Function>(dlsym(library_, name));
    }

    void* library_;
};

}  // namespace stts
