// Fibers change by longjmp between stacks, which the fortified longjmp takes for an error.
#undef _FORTIFY_SOURCE

#include "emulation/emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

// All __shared__ variables: the linker marks the ends of their section.
extern "C" {
[[gnu::weak, gnu::visibility("hidden")]] extern char __start_emulated_shared[];
[[gnu::weak, gnu::visibility("hidden")]] extern char __stop_emulated_shared[];
}

namespace emulation {
namespace {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 32 * 1024;
constexpr int64_t kMaxResumes = 20'000'000;  // of one block's threads; more is an endless loop
constexpr uint32_t kAllLanes = 0xFFFFFFFFU;

enum class State { kReady, kWaits, kDone };

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    State state = State::kDone;
    uint32_t exchanges = 0;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Warp {
    const char* intrinsic = nullptr;
    uint32_t arrived = 0;
    int32_t values[2][kWarpSize];  // of even and of odd exchanges
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<uint32_t> warp_order;
    std::vector<uint32_t> lane_order;
    jmp_buf scheduler;
    void (*body)(void*) = nullptr;
    void* context = nullptr;
    uint32_t threads = 0;
    uint32_t block = 0;
    uint32_t thread = 0;
    uint32_t at_barrier = 0;
    int64_t resumes = 0;
    const char* barrier_file = "";
    int barrier_line = 0;
    uint32_t seed = 0;
    int32_t launches_to_failure = -1;
    cudaError_t failure = cudaSuccess;
    int64_t launches = 0;
    bool faulty = false;
    char fault[256] = "";
};

Machine machine;
std::mutex machine_in_use;

Fiber& self() { return *machine.fibers[machine.thread]; }

[[gnu::format(printf, 1, 2)]] void setFault(const char* format, ...) {
    if (machine.faulty) return;
    machine.faulty = true;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(machine.fault, sizeof machine.fault, format, arguments);
    va_end(arguments);
}

// Both must be functions of their own: no local of a caller may live across the jump.
[[gnu::noinline]] void suspend() {
    if (_setjmp(self().resume) == 0) _longjmp(machine.scheduler, 1);
}

[[gnu::noinline]] void resume(uint32_t thread) {
    machine.thread = thread;
    if (_setjmp(machine.scheduler) != 0) return;
    if (self().started) _longjmp(self().resume, 1);
    self().started = true;
    setcontext(&self().start);
}

// A fiber outlives the kernel: it runs one thread after another.
void runThreads() {
    for (;;) {
        machine.body(machine.context);
        self().state = State::kDone;
        suspend();
    }
}

std::unique_ptr<Fiber> makeFiber() {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, runThreads, 0);
    return fiber;
}

// Fisher-Yates with a linear congruential generator: the same everywhere for one seed.
void shuffle(std::vector<uint32_t>& order, uint32_t count) {
    order.resize(count);
    for (uint32_t i = 0; i < count; ++i) order[i] = i;
    uint32_t random = machine.seed;
    for (uint32_t i = count; machine.seed != 0 && i > 1; --i) {
        random = random * 1664525U + 1013904223U;
        std::swap(order[i - 1], order[(random >> 8) % i]);
    }
}

void releaseBarrier() {
    machine.at_barrier = 0;
    for (uint32_t i = 0; i < machine.threads; ++i) machine.fibers[i]->state = State::kReady;
}

uint32_t countDone() {
    uint32_t done = 0;
    for (uint32_t i = 0; i < machine.threads; ++i) {
        if (machine.fibers[i]->state == State::kDone) ++done;
    }
    return done;
}

void fillSharedWithGarbage() {
    std::memset(__start_emulated_shared, 0xA5,
                static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
}

// Runs the threads of a warp up to where they wait. A warp goes on for as long as it can before the
// next one gets its turn: as far ahead as hardware may let it.
bool runWarp(uint32_t warp) {
    bool progress = false;
    for (const uint32_t lane : machine.lane_order) {
        const uint32_t thread = warp * kWarpSize + lane;
        if (machine.fibers[thread]->state != State::kReady || machine.faulty) continue;
        progress = true;
        resume(thread);
        if (++machine.resumes > kMaxResumes) setFault("the threads never come to an end");
    }
    return progress;
}

void runBlock(uint32_t block) {
    machine.block = block;
    machine.at_barrier = 0;
    machine.resumes = 0;
    machine.warps.assign((machine.threads + kWarpSize - 1) / kWarpSize, Warp{});
    for (uint32_t i = 0; i < machine.threads; ++i) {
        machine.fibers[i]->state = State::kReady;
        machine.fibers[i]->exchanges = 0;
    }
    bool progress = true;
    while (progress) {
        progress = false;
        for (const uint32_t warp : machine.warp_order) {
            while (runWarp(warp)) progress = true;
            if (machine.faulty) return;
        }
    }
    const uint32_t done = countDone();
    if (done == machine.threads) return;
    setFault(
        "block %u: %u threads wait at the barrier in %s:%d, %u in warp intrinsics and %u have "
        "returned",
        block, machine.at_barrier, machine.barrier_file, machine.barrier_line,
        machine.threads - machine.at_barrier - done, done);
}

}  // namespace

Index threadIndex() { return {machine.thread}; }
Index blockIndex() { return {machine.block}; }
Index blockSize() { return {machine.threads}; }

void syncBlock(const char* file, int line) {
    if (machine.at_barrier == 0) {
        machine.barrier_file = file;
        machine.barrier_line = line;
    } else if (line != machine.barrier_line || std::strcmp(file, machine.barrier_file) != 0) {
        setFault("threads wait at two barriers, %s:%d and %s:%d", machine.barrier_file,
                 machine.barrier_line, file, line);
    }
    ++machine.at_barrier;
    if (machine.at_barrier == machine.threads && !machine.faulty) {
        releaseBarrier();
        return;
    }
    self().state = State::kWaits;
    suspend();
}

const int32_t* exchangeInWarp(const char* intrinsic, uint32_t mask, int32_t value) {
    const uint32_t warp_index = machine.thread / kWarpSize;
    const uint32_t buffer = self().exchanges++ % 2;
    Warp& warp = machine.warps[warp_index];
    if (warp.arrived == 0) warp.intrinsic = intrinsic;
    if (mask != kAllLanes || std::strcmp(warp.intrinsic, intrinsic) != 0) {
        setFault("%s with mask %08x meets %s in one warp", intrinsic, mask, warp.intrinsic);
    }
    warp.values[buffer][machine.thread % kWarpSize] = value;
    if (++warp.arrived == kWarpSize && !machine.faulty) {
        warp.arrived = 0;
        for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
            machine.fibers[warp_index * kWarpSize + lane]->state = State::kReady;
        }
    } else {
        self().state = State::kWaits;
        suspend();
    }
    return machine.warps[warp_index].values[buffer];
}

void checkAlignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    setFault("access of %zu bytes at the address %p", bytes, address);
    self().state = State::kWaits;
    suspend();
}

cudaError_t launch(uint32_t blocks, uint32_t threads, void (*body)(void*), void* context) {
    const std::lock_guard<std::mutex> lock(machine_in_use);
    ++machine.launches;
    if (machine.launches_to_failure >= 0 && machine.launches_to_failure-- == 0) {
        return machine.failure;
    }
    if (blocks == 0 || threads == 0 || threads > kMaxThreads || threads % kWarpSize != 0) {
        return cudaErrorInvalidConfiguration;
    }
    machine.faulty = false;
    machine.fault[0] = '\0';
    machine.body = body;
    machine.context = context;
    machine.threads = threads;
    while (machine.fibers.size() < threads) machine.fibers.push_back(makeFiber());
    shuffle(machine.warp_order, threads / kWarpSize);
    shuffle(machine.lane_order, kWarpSize);
    for (uint32_t index = 0; index < blocks && !machine.faulty; ++index) {
        fillSharedWithGarbage();
        runBlock(index);
    }
    if (!machine.faulty) return cudaSuccess;
    machine.fibers.clear();  // they hang in the middle of the kernel
    return cudaErrorLaunchFailure;
}

void setSchedule(uint32_t seed) { machine.seed = seed; }

void failLaunch(int32_t others, cudaError_t error) {
    machine.launches_to_failure = others;
    machine.failure = error;
}

int64_t launches() { return machine.launches; }

const char* lastFault() { return machine.fault; }

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorMisalignedAddress:
            return "misaligned address";
        case cudaErrorLaunchFailure:
            return "unspecified launch failure";
    }
    return "unknown error";
}
