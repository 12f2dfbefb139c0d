// A CUDA block as the Block that plan.cuh asks for: one dimension, a multiple of 32 threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace stts {

class CudaBlock {
  public:
    static constexpr int32_t kWarpSize = 32;
    static constexpr int32_t kMaxThreads = 1024;

    struct Shared {
        int32_t warp_totals[kMaxThreads / kWarpSize];
    };

    struct Scan {
        int32_t before;  // sum over the threads before this one
        int32_t total;   // sum over all threads
    };

    __device__ explicit CudaBlock(Shared& shared) : shared_(shared) {}

    __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
    __device__ int32_t size() const { return static_cast<int32_t>(blockDim.x); }
    __device__ void sync() const { __syncthreads(); }

    __device__ Scan exclusiveScan(int32_t value) const {
        const int32_t inclusive = inclusiveWarpScan(value);
        if (lane() == kWarpSize - 1) shared_.warp_totals[warp()] = inclusive;
        sync();
        // Every warp scans the totals for itself, which saves handing the result around.
        const int32_t totals =
            inclusiveWarpScan(lane() < size() / kWarpSize ? shared_.warp_totals[lane()] : 0);
        const int32_t total = __shfl_sync(kAllLanes, totals, kWarpSize - 1);
        const int32_t previous = warp() == 0 ? 0 : warp() - 1;
        const int32_t up_to_previous = __shfl_sync(kAllLanes, totals, previous);
        sync();  // before the next scan overwrites the totals
        return {(warp() == 0 ? 0 : up_to_previous) + inclusive - value, total};
    }

    // Scores crowd into few buckets: one atomic per warp and bucket instead of one per thread.
    __device__ void count(int32_t* histogram, int32_t bucket) const {
        const uint32_t same_bucket = __match_any_sync(kAllLanes, bucket);
        const bool is_first = lane() == __ffs(static_cast<int32_t>(same_bucket)) - 1;
        if (bucket >= 0 && is_first) atomicAdd(&histogram[bucket], __popc(same_bucket));
    }

  private:
    static constexpr uint32_t kAllLanes = 0xFFFFFFFFU;

    __device__ int32_t lane() const { return thread() % kWarpSize; }
    __device__ int32_t warp() const { return thread() / kWarpSize; }

    __device__ int32_t inclusiveWarpScan(int32_t value) const {
        for (uint32_t distance = 1; distance < kWarpSize; distance *= 2) {
            const int32_t other = __shfl_up_sync(kAllLanes, value, distance);
            if (lane() >= static_cast<int32_t>(distance)) value += other;
        }
        return value;
    }

    Shared& shared_;
};

}  // namespace stts
