// The plan of one clip on the CPU, for tests: no hidden tokens are moved.
#pragma once

#include "emulated_plugin.h"

struct SttsPlanInput {
    const float* scores;  // (T, W)
    int32_t frames;       // T
    int32_t windows;      // W
    int32_t kept;         // K
    int32_t refill;       // 0 or 1
};

// Memory for the largest B there can be, min(T, 2K/W + 1).
struct SttsPlanOutput {
    int32_t* segment;      // (B, W) frame of a slot, -1 for free slots
    int32_t* slot_window;  // (B, W) window of a slot, -1 for free slots
    int32_t* kept_slot;    // (K)
    int32_t* kept_window;  // (K)
    int32_t* bin_count;    // () B
};

// The algorithm run by one thread.
STTS_TEST_API int stts_plan_serial(const SttsPlanInput* input, const SttsPlanOutput* output);

// The kernel in an emulated block. `missing_bytes` makes the workspace smaller than it must be.
// Returns 0, a cudaError_t or STTS_GUARD_DAMAGED.
STTS_TEST_API int stts_plan_block(const SttsPlanInput* input, const SttsPlanOutput* output,
                                  int32_t threads, int32_t missing_bytes);
