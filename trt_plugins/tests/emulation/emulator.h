// Runs the threads of a CUDA block as fibers of one CPU thread.
//
// A fiber runs until it meets the others: at __syncthreads, or in a warp intrinsic. A meeting that
// some threads never come to (a divergent barrier) is a fault: the launch fails with
// cudaErrorLaunchFailure and lastFault() says what happened. The order in which fibers run can be
// shuffled, which brings out missing barriers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace emulation {

struct Index {
    uint32_t x;
};

// Of the fiber that asks.
Index threadIndex();
Index blockIndex();
Index blockSize();

void syncBlock(const char* file, int line);

// The values of the 32 lanes of the warp; valid until the lane's next exchange.
const int32_t* exchangeInWarp(const char* intrinsic, uint32_t mask, int32_t value);

void checkAlignment(const void* address, size_t bytes);

cudaError_t launch(uint32_t blocks, uint32_t threads, void (*body)(void*), void* context);

// 0 runs threads in order, anything else in an order of its own.
void setSchedule(uint32_t seed);

// Makes the launch after `others` more ones fail with `error`, without running it.
void failLaunch(int32_t others, cudaError_t error);

int64_t launches();

// What went wrong in the latest faulty launch, "" if none did.
const char* lastFault();

}  // namespace emulation
