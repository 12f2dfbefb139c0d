// CUDA C++ on the CPU: enough of the language and of the runtime to compile the kernels as C++ and
// to run them on the emulator. Stands in for NVIDIA's header of this name.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "emulation/emulator.h"

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("emulated_shared")))

struct dim3 {
    explicit dim3(uint32_t x_ = 1) : x(x_) {}
    uint32_t x;
};

struct alignas(8) uint2 {
    uint32_t x, y;
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

#define threadIdx (emulation::threadIndex())
#define blockIdx (emulation::blockIndex())
#define blockDim (emulation::blockSize())
#define __syncthreads() emulation::syncBlock(__FILE__, __LINE__)

inline int32_t __shfl_sync(uint32_t mask, int32_t value, int32_t lane) {
    const auto* values = emulation::exchangeInWarp("__shfl_sync", mask, value);
    return values[lane % 32];
}

inline int32_t __shfl_up_sync(uint32_t mask, int32_t value, uint32_t distance) {
    const auto* values = emulation::exchangeInWarp("__shfl_up_sync", mask, value);
    const uint32_t lane = threadIdx.x % 32;
    return lane < distance ? value : values[lane - distance];
}

inline uint32_t __match_any_sync(uint32_t mask, int32_t value) {
    const auto* values = emulation::exchangeInWarp("__match_any_sync", mask, value);
    uint32_t equal = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (values[lane] == value) equal |= 1U << lane;
    }
    return equal;
}

inline int32_t __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int32_t __ffs(int32_t bits) { return __builtin_ffs(bits); }

inline int32_t atomicAdd(int32_t* address, int32_t value) {
    const int32_t before = *address;
    *address += value;
    return before;
}

template <class Word>
Word __ldcs(const Word* address) {
    emulation::checkAlignment(address, sizeof(Word));
    return *address;
}

template <class Word>
void __stcs(Word* address, Word value) {
    emulation::checkAlignment(address, sizeof(Word));
    *address = value;
}

namespace emulation {

template <class... Parameters>
struct KernelCall {
    void (*kernel)(Parameters...);
    void** arguments;

    static void run(void* call) {
        static_cast<KernelCall*>(call)->invoke(std::index_sequence_for<Parameters...>{});
    }

    template <size_t... Index>
    void invoke(std::index_sequence<Index...>) {
        kernel(*static_cast<Parameters*>(arguments[Index])...);
    }
};

}  // namespace emulation

// Runs the grid before it returns, one block after another.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t /*shared_bytes*/, cudaStream_t /*stream*/) {
    emulation::KernelCall<Parameters...> call{kernel, arguments};
    return emulation::launch(grid.x, block.x, &emulation::KernelCall<Parameters...>::run, &call);
}
