// Launches the selection, packing and gathering of one clip.
// Axes: T frames, W windows of a frame, K kept windows, B bins of W slots.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace stts {

constexpr int64_t kMaxFrames = 4096;
constexpr int64_t kMaxWindows = 4096;
constexpr int64_t kMaxWindowBytes = INT32_MAX;

struct SelectPackShape {
    int32_t frames;        // T, 1..kMaxFrames
    int32_t windows;       // W, 1..kMaxWindows
    int32_t kept;          // K, 1..T*W
    int32_t window_bytes;  // of hidden, for one window: even
    bool refill;           // a frame alone in its bin gets its removed windows back as context
};

// Device memory.
struct SelectPackTensors {
    const float* scores;   // (T, W)
    const void* hidden;    // (T, W, window_bytes)
    void* bins;            // (B, W, window_bytes), zeros in free slots
    int32_t* segment;      // (B, W) frame of a slot, -1 for free slots
    int32_t* kept_slot;    // (K) index into the B*W slots of each kept window, frame-major
    int32_t* kept_window;  // (K) index into the T*W windows, ascending
    int32_t* bin_count;    // () B
};

// The largest B there can be. All bins but one are more than half full, so B < 2K/W + 1.
constexpr int64_t maxBins(int64_t frames, int64_t windows, int64_t kept) {
    const int64_t filled = 2 * kept / windows + 1;
    return filled < frames ? filled : frames;
}

// Bytes of workspace for clips of up to this size.
size_t selectPackWorkspaceBytes(int64_t frames, int64_t windows);

// Two kernels on `stream`, and nothing else: no allocation, no synchronisation. `workspace` holds
// selectPackWorkspaceBytes(T, W) bytes. Returns without a launch if an address is null or not
// aligned: to 4 bytes, `hidden` and `bins` to 2.
cudaError_t launchSelectPack(const SelectPackShape& shape, const SelectPackTensors& tensors,
                             void* workspace, cudaStream_t stream);

// Its two kernels one by one, on checked addresses: first the plan, then the gather.
cudaError_t launchPlan(const SelectPackShape& shape, const SelectPackTensors& tensors,
                       void* workspace, cudaStream_t stream);
cudaError_t launchGather(const SelectPackShape& shape, const SelectPackTensors& tensors,
                         void* workspace, cudaStream_t stream);

}  // namespace stts
