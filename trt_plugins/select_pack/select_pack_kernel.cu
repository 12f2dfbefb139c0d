#include "select_pack/select_pack_kernel.h"

#include <cuda_runtime.h>

#include "select_pack/block.cuh"
#include "select_pack/gather.cuh"
#include "select_pack/plan.cuh"

namespace stts {
namespace {

constexpr uint32_t kPlanThreads = CudaBlock::kMaxThreads;

__global__ void __launch_bounds__(kPlanThreads)
    planClip(PlanInput input, PlanOutput output, PlanWorkspace work) {
    __shared__ PlanShared plan_shared;
    __shared__ CudaBlock::Shared block_shared;
    CudaBlock block(block_shared);
    planPacking(block, input, output, work, plan_shared);
}

// Hands out consecutive pieces of the workspace; with no workspace it only measures.
class Carver {
  public:
    explicit Carver(int32_t* base) : base_(base) {}

    int32_t* take(int64_t count) {
        int32_t* piece = base_ == nullptr ? nullptr : base_ + taken_;
        taken_ += count;
        return piece;
    }
    size_t bytes() const { return static_cast<size_t>(taken_) * sizeof(int32_t); }

  private:
    int32_t* base_;
    int64_t taken_ = 0;
};

PlanWorkspace carve(Carver& carver, int64_t frames, int64_t windows) {
    PlanWorkspace work{};
    work.first_kept = carver.take(frames + 1);
    work.order = carver.take(frames);
    work.peers = carver.take(frames);
    work.first_slot = carver.take(frames);
    work.used = carver.take(frames);
    work.members = carver.take(frames);
    work.slot_window = carver.take(frames * windows);
    return work;
}

bool isAligned(const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <class Word>
bool fits(const SelectPackShape& shape, const SelectPackTensors& tensors) {
    return static_cast<size_t>(shape.window_bytes) % sizeof(Word) == 0 &&
           isAligned(tensors.hidden, sizeof(Word)) && isAligned(tensors.bins, sizeof(Word));
}

// Threads for one slot: as few rounds of kWordsInFlight loads as the block size allows, with every
// thread busy in the last round too.
uint32_t gatherThreads(int32_t words) {
    constexpr int32_t kMost = kGatherThreads * kWordsInFlight;
    const int32_t rounds = words / kMost + (words % kMost != 0 ? 1 : 0);
    const int32_t words_per_thread = rounds * kWordsInFlight;
    const int32_t threads = words / words_per_thread + (words % words_per_thread != 0 ? 1 : 0);
    return static_cast<uint32_t>((threads + 31) / 32 * 32);
}

template <class Word>
cudaError_t launchGatherOf(const SelectPackShape& shape, const SelectPackTensors& tensors,
                           const PlanWorkspace& work, cudaStream_t stream) {
    const Word* hidden = static_cast<const Word*>(tensors.hidden);
    const int32_t* slot_window = work.slot_window;
    const int32_t* bin_count = tensors.bin_count;
    int32_t windows = shape.windows;
    int32_t words = shape.window_bytes / static_cast<int32_t>(sizeof(Word));
    Word* bins = static_cast<Word*>(tensors.bins);
    void* arguments[] = {&hidden, &slot_window, &bin_count, &windows, &words, &bins};
    const int64_t slots = maxBins(shape.frames, shape.windows, shape.kept) * shape.windows;
    return cudaLaunchKernel(gatherWindows<Word>, dim3(static_cast<uint32_t>(slots)),
                            dim3(gatherThreads(words)), arguments, 0, stream);
}

}  // namespace

size_t selectPackWorkspaceBytes(int64_t frames, int64_t windows) {
    Carver carver(nullptr);
    carve(carver, frames, windows);
    return carver.bytes();
}

cudaError_t launchPlan(const SelectPackShape& shape, const SelectPackTensors& tensors,
                       void* workspace, cudaStream_t stream) {
    Carver carver(static_cast<int32_t*>(workspace));
    PlanWorkspace work = carve(carver, shape.frames, shape.windows);
    PlanInput input{tensors.scores, shape.frames, shape.windows, shape.kept, shape.refill};
    PlanOutput output{tensors.segment, tensors.kept_slot, tensors.kept_window, tensors.bin_count};
    void* arguments[] = {&input, &output, &work};
    return cudaLaunchKernel(planClip, dim3(1), dim3(kPlanThreads), arguments, 0, stream);
}

cudaError_t launchGather(const SelectPackShape& shape, const SelectPackTensors& tensors,
                         void* workspace, cudaStream_t stream) {
    Carver carver(static_cast<int32_t*>(workspace));
    const PlanWorkspace work = carve(carver, shape.frames, shape.windows);
    if (fits<uint4>(shape, tensors)) return launchGatherOf<uint4>(shape, tensors, work, stream);
    if (fits<uint2>(shape, tensors)) return launchGatherOf<uint2>(shape, tensors, work, stream);
    if (fits<uint32_t>(shape, tensors)) {
        return launchGatherOf<uint32_t>(shape, tensors, work, stream);
    }
    return launchGatherOf<uint16_t>(shape, tensors, work, stream);
}

cudaError_t launchSelectPack(const SelectPackShape& shape, const SelectPackTensors& tensors,
                             void* workspace, cudaStream_t stream) {
    for (const void* address :
         {static_cast<const void*>(tensors.scores), static_cast<const void*>(tensors.segment),
          static_cast<const void*>(tensors.kept_slot),
          static_cast<const void*>(tensors.kept_window),
          static_cast<const void*>(tensors.bin_count), static_cast<const void*>(workspace)}) {
        if (address == nullptr) return cudaErrorInvalidValue;
        if (!isAligned(address, sizeof(int32_t))) return cudaErrorMisalignedAddress;
    }
    if (tensors.hidden == nullptr || tensors.bins == nullptr) return cudaErrorInvalidValue;
    if (!fits<uint16_t>(shape, tensors)) return cudaErrorMisalignedAddress;

    const cudaError_t planned = launchPlan(shape, tensors, workspace, stream);
    if (planned != cudaSuccess) return planned;
    return launchGather(shape, tensors, workspace, stream);
}

}  // namespace stts
