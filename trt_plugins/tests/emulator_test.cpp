// The emulator must find what it is there to find.
#include "emulation/emulator.h"

#include <cuda_runtime.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "guarded_buffer.h"

namespace {

constexpr uint32_t kThreads = 64;

__global__ void reverse(int32_t* values) {
    __shared__ int32_t shared[kThreads];
    shared[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void reverseWithoutBarrier(int32_t* values) {
    __shared__ int32_t shared[kThreads];
    shared[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void barrierForHalf(int32_t* /*values*/) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();
    }
}

__global__ void barrierInTwoBranches(int32_t* /*values*/) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void shuffleForHalfAWarp(int32_t* values) {
    if (threadIdx.x % 32 < 16) values[threadIdx.x] = __shfl_sync(0xFFFFFFFFU, 1, 0);
    __syncthreads();
}

__global__ void unlikeIntrinsics(int32_t* values) {
    values[threadIdx.x] =
        threadIdx.x % 2 == 0 ? __shfl_sync(0xFFFFFFFFU, 1, 0) : __shfl_up_sync(0xFFFFFFFFU, 1, 1);
}

__global__ void endlessLoop(int32_t* values) {
    while (values[kThreads] != 0) {
        __syncthreads();
    }
}

__global__ void misalignedLoad(int32_t* values) {
    const auto* address = reinterpret_cast<const uint4*>(values + 1);
    values[threadIdx.x] = static_cast<int32_t>(__ldcs(address).x);
}

__global__ void warpIntrinsics(int32_t* values) {
    const auto lane = static_cast<int32_t>(threadIdx.x % 32);
    const int32_t before = __shfl_up_sync(0xFFFFFFFFU, lane, 3);
    const uint32_t thirds = __match_any_sync(0xFFFFFFFFU, lane % 3);
    atomicAdd(&values[0], before);
    atomicAdd(&values[1], __popc(thirds));
    if (__ffs(static_cast<int32_t>(thirds)) - 1 == lane) atomicAdd(&values[2], 1);
}

cudaError_t run(void (*kernel)(int32_t*), std::vector<int32_t>& values, uint32_t threads) {
    int32_t* address = values.data();
    void* arguments[] = {&address};
    return cudaLaunchKernel(kernel, dim3(1), dim3(threads), arguments, 0, nullptr);
}

std::vector<int32_t> ramp() {
    std::vector<int32_t> values(kThreads + 4);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i);
    return values;
}

bool isReversed(const std::vector<int32_t>& values) {
    for (uint32_t i = 0; i < kThreads; ++i) {
        if (values[i] != static_cast<int32_t>(kThreads - 1 - i)) return false;
    }
    return true;
}

void findsFault(void (*kernel)(int32_t*), const char* expected) {
    auto values = ramp();
    CHECK(run(kernel, values, kThreads) == cudaErrorLaunchFailure);
    if (!CHECK(std::strstr(emulation::lastFault(), expected) != nullptr)) {
        std::fprintf(stderr, "  fault: '%s', expected: '%s'\n", emulation::lastFault(), expected);
    }
}

void runsCorrectKernels() {
    for (uint32_t seed = 0; seed < 5; ++seed) {
        emulation::setSchedule(seed);
        auto values = ramp();
        CHECK(run(reverse, values, kThreads) == cudaSuccess && isReversed(values));
        auto missing = ramp();
        CHECK(run(reverseWithoutBarrier, missing, kThreads) == cudaSuccess && !isReversed(missing));
    }
    emulation::setSchedule(0);
    std::vector<int32_t> sums(3, 0);
    CHECK(run(warpIntrinsics, sums, 32) == cudaSuccess);
    CHECK(sums[0] == 0 + 1 + 2 + 28 * 29 / 2);
    CHECK(sums[1] == 11 * 11 + 11 * 11 + 10 * 10);
    CHECK(sums[2] == 3);
}

void findsFaults() {
    findsFault(barrierForHalf, "32 threads wait at the barrier");
    findsFault(barrierInTwoBranches, "two barriers");
    findsFault(shuffleForHalfAWarp, "at the barrier");
    findsFault(unlikeIntrinsics, "meets");
    findsFault(misalignedLoad, "access of 16 bytes");
    findsFault(endlessLoop, "never come to an end");
    auto values = ramp();
    CHECK(run(reverse, values, kThreads) == cudaSuccess && isReversed(values));
    CHECK(std::strcmp(emulation::lastFault(), "") == 0);
}

void refusesLaunches() {
    auto values = ramp();
    CHECK(run(reverse, values, 33) == cudaErrorInvalidConfiguration);
    CHECK(run(reverse, values, 0) == cudaErrorInvalidConfiguration);
    emulation::failLaunch(1, cudaErrorNoDevice);
    CHECK(run(reverse, values, kThreads) == cudaSuccess);
    CHECK(run(reverse, values, kThreads) == cudaErrorNoDevice);
    CHECK(run(reverse, values, kThreads) == cudaSuccess);
}

void guardsBuffers() {
    for (const ptrdiff_t at : {-1, 16, 0}) {
        stts::GuardedBuffer buffer(16);
        static_cast<uint8_t*>(buffer.data())[at] = 0;
        CHECK(buffer.isIntact() == (at == 0));
    }
}

}  // namespace

int main() {
    runsCorrectKernels();
    findsFaults();
    refusesLaunches();
    guardsBuffers();
    return stts::exitCode();
}
