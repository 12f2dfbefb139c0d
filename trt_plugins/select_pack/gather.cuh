// Moves the windows of a clip into their slots: one block of threads per slot.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "select_pack/plan.cuh"

namespace stts {

constexpr int32_t kGatherThreads = 256;
constexpr int32_t kWordsInFlight = 4;  // loads of one thread before its first store

// hidden (T*W, words_per_window) -> bins (B*W, words_per_window); zeros in free slots.
// The grid covers the largest B there can be; blocks past B*W slots have nothing to do.
template <class Word>
__global__ void __launch_bounds__(kGatherThreads)
    gatherWindows(const Word* hidden, const int32_t* slot_window, const int32_t* bin_count,
                  int32_t windows, int32_t words_per_window, Word* bins) {
    const int32_t slot = static_cast<int32_t>(blockIdx.x);
    if (slot >= *bin_count * windows) return;
    const int32_t window = slot_window[slot];
    const Word* source =
        window == kFree ? nullptr : hidden + static_cast<int64_t>(window) * words_per_window;
    Word* target = bins + static_cast<int64_t>(slot) * words_per_window;
    const int32_t step = static_cast<int32_t>(blockDim.x);

    for (int32_t first = static_cast<int32_t>(threadIdx.x); first < words_per_window;
         first += step * kWordsInFlight) {
        Word words[kWordsInFlight] = {};
        for (int32_t i = 0; i < kWordsInFlight; ++i) {
            const int32_t at = first + i * step;
            if (at < words_per_window && source != nullptr) words[i] = __ldcs(source + at);
        }
        for (int32_t i = 0; i < kWordsInFlight; ++i) {
            const int32_t at = first + i * step;
            if (at < words_per_window) __stcs(target + at, words[i]);
        }
    }
}

}  // namespace stts
