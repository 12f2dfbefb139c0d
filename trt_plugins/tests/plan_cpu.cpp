// The kernels as C++ for the CPU, and the plan alone as a C interface for ctypes.
#include "select_pack/select_pack_kernel.cu"  // the very text that nvcc compiles

#include <algorithm>

#include "guarded_buffer.h"
#include "host_block.h"
#include "plan_cpu.h"

namespace {

struct Workspace {
    Workspace(int32_t frames, int32_t windows, int32_t missing_bytes)
        : memory(stts::selectPackWorkspaceBytes(frames, windows) -
                 static_cast<size_t>(missing_bytes)),
          carver(static_cast<int32_t*>(memory.data())),
          plan(stts::carve(carver, frames, windows)) {}

    stts::GuardedBuffer memory;
    stts::Carver carver;
    stts::PlanWorkspace plan;
};

}  // namespace

int stts_plan_serial(const SttsPlanInput* in, const SttsPlanOutput* out) {
    Workspace workspace(in->frames, in->windows, 0);
    stts::HostBlock block;
    stts::PlanShared shared;
    const stts::PlanInput input{in->scores, in->frames, in->windows, in->kept, in->refill != 0};
    const stts::PlanOutput output{out->segment, out->kept_slot, out->kept_window, out->bin_count};
    stts::planPacking(block, input, output, workspace.plan, shared);
    std::copy_n(workspace.plan.slot_window, *out->bin_count * in->windows, out->slot_window);
    return workspace.memory.isIntact() ? 0 : STTS_GUARD_DAMAGED;
}

int stts_plan_block(const SttsPlanInput* in, const SttsPlanOutput* out, int32_t threads,
                    int32_t missing_bytes) {
    Workspace workspace(in->frames, in->windows, missing_bytes);
    stts::PlanInput input{in->scores, in->frames, in->windows, in->kept, in->refill != 0};
    stts::PlanOutput output{out->segment, out->kept_slot, out->kept_window, out->bin_count};
    void* arguments[] = {&input, &output, &workspace.plan};
    const cudaError_t error = cudaLaunchKernel(
        stts::planClip, dim3(1), dim3(static_cast<uint32_t>(threads)), arguments, 0, nullptr);
    if (error != cudaSuccess) return error;
    std::copy_n(workspace.plan.slot_window, *out->bin_count * in->windows, out->slot_window);
    return workspace.memory.isIntact() ? 0 : STTS_GUARD_DAMAGED;
}
