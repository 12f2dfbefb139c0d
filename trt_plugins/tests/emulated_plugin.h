// The whole plugin on the CPU, as TensorRT would drive it: creator, plugin, capabilities, output
// shapes, workspace, serialisation, enqueue. Stands in for the engine `select_pack`.
#pragma once

#include <stdint.h>

#define STTS_TEST_API extern "C" __attribute__((visibility("default")))

enum SttsHiddenType { STTS_FLOAT32 = 0, STTS_FLOAT16 = 1, STTS_BFLOAT16 = 2 };

enum SttsEmulationStatus {
    STTS_NO_PLUGIN = -1,      // the creator refused
    STTS_BUILD_REFUSED = -2,  // refused before enqueue
    STTS_GUARD_DAMAGED = -3,  // something wrote outside of the workspace
};

// Host memory in place of device memory. Outputs must have room for B = min(T, 2K/W + 1).
// Returns 0, an SttsEmulationStatus, or the status of enqueue; messages go to stderr.
STTS_TEST_API int stts_emulated_select_pack(const float* scores,   // (T, W)
                                            const void* hidden,    // (T, W*G, D) of hidden_type
                                            int hidden_type,       // SttsHiddenType
                                            int64_t frames,        // T
                                            int64_t windows,       // W
                                            int64_t patches,       // G, of a window
                                            int64_t width,         // D
                                            int64_t kept,          // K
                                            int refill,            // 0 or 1
                                            void* bins,            // (B, W*G, D) of hidden_type
                                            int32_t* segment,      // (B, W)
                                            int32_t* kept_slot,    // (K)
                                            int32_t* kept_window,  // (K)
                                            int32_t* bin_count);   // () B

// Makes the launch after `others` more ones fail with the cudaError_t `error`.
STTS_TEST_API void stts_emulation_fail_launch(int32_t others, int32_t error);

// Kernels launched so far.
STTS_TEST_API int64_t stts_emulation_launches();

// The order in which emulated threads run: 0 is by index.
STTS_TEST_API void stts_emulation_schedule(uint32_t seed);

// What went wrong inside the latest launch, "" if nothing did.
STTS_TEST_API const char* stts_emulation_fault();
