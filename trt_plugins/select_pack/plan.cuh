// Which windows of a clip survive, and where they go: one block of threads plans a whole clip.
//
// The algorithm of stts_export/runtime/planner.py, written over a `Block` so that the same text
// runs as a CUDA block (block.cuh) and as a single thread in the tests (tests/host_block.h). A
// Block has
//   thread(), size()           this thread and the number of threads, 1024 at most
//   sync()                     all threads of the block meet; memory is visible afterwards
//   exclusiveScan(value)       {before, total} over the threads; every thread must call it, and it
//                              is a barrier like sync()
//   count(histogram, bucket)   ++histogram[bucket] unless bucket < 0; every thread must call it
//
// Axes: T frames, W windows of a frame, K kept windows, B bins of W slots.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace stts {

constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadixBuckets = 1 << kRadixBits;
constexpr float kFirstFrameScore = 100.0F;
constexpr int32_t kFree = -1;  // the segment, and the window, of a slot that holds nothing

struct PlanInput {
    const float* scores;  // (T, W)
    int32_t frames;       // T
    int32_t windows;      // W
    int32_t kept;         // K
    bool refill;          // a frame alone in its bin gets its removed windows back as context
};

struct PlanOutput {
    int32_t* segment;      // (B, W) frame of a slot, kFree for free slots
    int32_t* kept_slot;    // (K) index into the B*W slots of each kept window, frame-major
    int32_t* kept_window;  // (K) index into the T*W windows, ascending
    int32_t* bin_count;    // () B
};

struct PlanWorkspace {
    int32_t* first_kept;   // (T + 1) kept windows of earlier frames
    int32_t* order;        // (T) frames by count descending, then by index
    int32_t* peers;        // (T) frames with as many kept windows as this one, itself included
    int32_t* first_slot;   // (T) first slot of a frame, kFree for a frame without windows
    int32_t* used;         // (T) slots taken in a bin
    int32_t* members;      // (T) frames in a bin
    int32_t* slot_window;  // (B, W) window that fills a slot, kFree for free slots
};

// What the threads of a block share besides the workspace.
struct PlanShared {
    int32_t histogram[kRadixBuckets];
    int32_t bucket;  // the one that holds the searched rank
    int32_t below;   // windows in the buckets before it
};

// Windows with a key below `key` are removed, and so are the first `removed_ties` that equal it.
struct Threshold {
    uint32_t key;
    int32_t removed_ties;
};

// Maps a score to an integer of the same order: -0 equals 0, every NaN is largest.
__device__ inline uint32_t orderedKey(float score) {
    constexpr uint32_t kSign = 0x80000000U;
    constexpr uint32_t kInfinity = 0x7F800000U;
    uint32_t bits = 0;
    memcpy(&bits, &score, sizeof bits);
    if ((bits & ~kSign) > kInfinity) return 0xFFFFFFFFU;
    if (bits == kSign) return kSign;
    return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

__device__ inline uint32_t keyOf(const PlanInput& input, int32_t window) {
    return orderedKey(window < input.windows ? kFirstFrameScore : input.scores[window]);
}

// Finds the bucket whose windows hold `rank`, counting from 0 in ascending order.
template <class Block>
__device__ void findBucket(Block& block, int32_t rank, PlanShared& shared) {
    int32_t below = 0;
    for (int32_t base = 0; base < kRadixBuckets; base += block.size()) {
        const int32_t bucket = base + block.thread();
        const int32_t count = bucket < kRadixBuckets ? shared.histogram[bucket] : 0;
        const auto scan = block.exclusiveScan(count);
        const int32_t first = below + scan.before;
        if (first <= rank && rank < first + count) {
            shared.bucket = bucket;
            shared.below = first;
        }
        below += scan.total;
    }
    block.sync();
}

// Radix select: settles the key of the last window to remove, 8 bits at a time from the top.
template <class Block>
__device__ Threshold findThreshold(Block& block, const PlanInput& input, PlanShared& shared) {
    const int32_t total = input.frames * input.windows;
    if (input.kept == total) return {0, 0};
    uint32_t key = 0;
    int32_t rank = total - input.kept - 1;  // among the windows that share the settled bits
    for (int32_t shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
        for (int32_t i = block.thread(); i < kRadixBuckets; i += block.size()) {
            shared.histogram[i] = 0;
        }
        block.sync();
        for (int32_t base = 0; base < total; base += block.size()) {
            const int32_t window = base + block.thread();
            int32_t bucket = -1;
            if (window < total) {
                const uint32_t candidate = keyOf(input, window);
                const bool shares_settled_bits = (candidate ^ key) >> shift >> kRadixBits == 0;
                if (shares_settled_bits) {
                    bucket = static_cast<int32_t>(candidate >> shift & (kRadixBuckets - 1));
                }
            }
            block.count(shared.histogram, bucket);
        }
        block.sync();
        findBucket(block, rank, shared);
        key |= static_cast<uint32_t>(shared.bucket) << shift;
        rank -= shared.below;
    }
    return {key, rank + 1};
}

// Writes kept_window and first_kept in one pass over the windows.
template <class Block>
__device__ void listKept(Block& block, const PlanInput& input, Threshold threshold,
                         int32_t* kept_window, int32_t* first_kept) {
    const int32_t total = input.frames * input.windows;
    int32_t larger = 0;  // than the threshold, in earlier tiles
    int32_t ties = 0;    // with the threshold, in earlier tiles
    for (int32_t base = 0; base < total; base += block.size()) {
        const int32_t window = base + block.thread();
        const uint32_t key = window < total ? keyOf(input, window) : 0;
        const bool is_larger = window < total && key > threshold.key;
        const bool is_tie = window < total && key == threshold.key;
        // A tile has at most 1024 windows, so one scan carries both counts, 16 bits each.
        const auto scan = block.exclusiveScan((is_larger ? 1 : 0) | (is_tie ? 1 << 16 : 0));
        const int32_t ties_before = ties + (scan.before >> 16);
        const int32_t kept_ties_before =
            ties_before < threshold.removed_ties ? 0 : ties_before - threshold.removed_ties;
        const int32_t kept_before = larger + (scan.before & 0xFFFF) + kept_ties_before;
        if (window < total && window % input.windows == 0) {
            first_kept[window / input.windows] = kept_before;
        }
        if (is_larger || (is_tie && ties_before >= threshold.removed_ties)) {
            kept_window[kept_before] = window;
        }
        larger += scan.total & 0xFFFF;
        ties += scan.total >> 16;
    }
    if (block.thread() == 0) first_kept[input.frames] = input.kept;
    block.sync();
}

__device__ inline int32_t keptOf(const PlanWorkspace& work, int32_t frame) {
    return work.first_kept[frame + 1] - work.first_kept[frame];
}

// Ranks the frames: largest first, of equal ones the lower index first. Every frame looks at every
// other: T*T steps for the block, as against the T*W of a pass over the windows.
template <class Block>
__device__ void sortFrames(Block& block, int32_t frames, const PlanWorkspace& work) {
    for (int32_t frame = block.thread(); frame < frames; frame += block.size()) {
        const int32_t count = keptOf(work, frame);
        int32_t before = 0;
        int32_t peers = 0;
        for (int32_t other = 0; other < frames; ++other) {
            const int32_t other_count = keptOf(work, other);
            if (other_count > count || (other_count == count && other < frame)) ++before;
            if (other_count == count) ++peers;
        }
        work.order[before] = frame;
        work.peers[frame] = peers;
    }
    block.sync();
}

// Places `group` frames of `size` windows, order[position] first: they fill the bins in index
// order, each bin as far as it goes, which is where first-fit puts them one by one. An empty bin is
// a bin with all its room, so new bins need no case of their own. Returns the bins that this
// thread opened; a bin belongs to one thread throughout, so groups need no sync between them.
template <class Block>
__device__ int32_t placeGroup(Block& block, const PlanInput& input, const PlanWorkspace& work,
                              int32_t position, int32_t group, int32_t size) {
    int32_t opened = 0;
    int32_t placed = 0;
    for (int32_t base = 0; placed < group; base += block.size()) {
        const int32_t bin = base + block.thread();
        const int32_t fits = bin < input.frames ? (input.windows - work.used[bin]) / size : 0;
        const auto scan = block.exclusiveScan(fits);
        const int32_t first = placed + scan.before;
        const int32_t left = first < group ? group - first : 0;
        const int32_t taken = fits < left ? fits : left;
        if (taken > 0) {
            int32_t slot = bin * input.windows + work.used[bin];
            for (int32_t i = 0; i < taken; ++i, slot += size) {
                work.first_slot[work.order[position + first + i]] = slot;
            }
            if (work.members[bin] == 0) ++opened;
            work.used[bin] += taken * size;
            work.members[bin] += taken;
        }
        placed += scan.total;
    }
    return opened;
}

// First-fit descending: writes first_slot and members, returns the number of bins. The scans are
// all the barriers it needs: a thread clears first_slot of its frames before the first one and
// fills those of other threads' frames after it, and the last one ends the last group.
template <class Block>
__device__ int32_t placeFrames(Block& block, const PlanInput& input, const PlanWorkspace& work) {
    for (int32_t frame = block.thread(); frame < input.frames; frame += block.size()) {
        work.first_slot[frame] = kFree;
        work.used[frame] = 0;
        work.members[frame] = 0;
    }
    int32_t opened = 0;
    int32_t group = 0;
    for (int32_t position = 0; position < input.frames; position += group) {
        const int32_t leader = work.order[position];
        const int32_t size = keptOf(work, leader);
        if (size == 0) break;
        group = work.peers[leader];
        opened += placeGroup(block, input, work, position, group, size);
    }
    return block.exclusiveScan(opened).total;
}

__device__ inline bool isRefilled(const PlanInput& input, const PlanWorkspace& work,
                                  int32_t frame) {
    return input.refill && work.members[work.first_slot[frame] / input.windows] == 1;
}

// Writes what every slot holds: kept windows in order, or all windows of a refilled frame.
template <class Block>
__device__ void fillSlots(Block& block, const PlanInput& input, const PlanWorkspace& work,
                          int32_t bins, const PlanOutput& output) {
    const int32_t slots = bins * input.windows;
    for (int32_t slot = block.thread(); slot < slots; slot += block.size()) {
        work.slot_window[slot] = kFree;
        output.segment[slot] = kFree;
    }
    block.sync();
    const int32_t total = input.frames * input.windows;
    for (int32_t i = block.thread(); i < total; i += block.size()) {
        const int32_t frame = i / input.windows;
        const int32_t place = i % input.windows;  // among the slots of the frame
        if (work.first_slot[frame] == kFree) continue;
        const bool refilled = isRefilled(input, work, frame);
        if (!refilled && place >= keptOf(work, frame)) continue;
        const int32_t slot = work.first_slot[frame] + place;
        work.slot_window[slot] = refilled ? i : output.kept_window[work.first_kept[frame] + place];
        output.segment[slot] = frame;
    }
}

// Writes the slot of every kept window.
template <class Block>
__device__ void locateKept(Block& block, const PlanInput& input, const PlanWorkspace& work,
                           const PlanOutput& output) {
    for (int32_t i = block.thread(); i < input.kept; i += block.size()) {
        const int32_t window = output.kept_window[i];
        const int32_t frame = window / input.windows;
        const int32_t place = isRefilled(input, work, frame) ? window - frame * input.windows
                                                             : i - work.first_kept[frame];
        output.kept_slot[i] = work.first_slot[frame] + place;
    }
}

// Every thread of the block calls it. The outputs are complete when the block has ended.
template <class Block>
__device__ void planPacking(Block& block, const PlanInput& input, const PlanOutput& output,
                            const PlanWorkspace& work, PlanShared& shared) {
    const Threshold threshold = findThreshold(block, input, shared);
    listKept(block, input, threshold, output.kept_window, work.first_kept);
    sortFrames(block, input.frames, work);
    const int32_t bins = placeFrames(block, input, work);
    fillSlots(block, input, work, bins, output);
    locateKept(block, input, work, output);
    if (block.thread() == 0) *output.bin_count = bins;
}

}  // namespace stts
