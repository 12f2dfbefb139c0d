// Runs the kernels of select_pack on a GPU without TensorRT: for the tests in tests/gpu and for
// benchmarks/bench_plugin.py.
//
//   select_pack_device run CASES RESULTS     compute every case of a file
//   select_pack_device time T W WINDOW_BYTES K REPEATS     print medians as JSON
//
// Memory is poisoned first, unless STTS_NO_POISON is set: compute-sanitizer's initcheck would take
// the poison for an initialisation.
//
// CASES:   per case int32 {T, W, window_bytes, K, refill}, f32 scores (T, W), hidden (T, W, bytes)
// RESULTS: per case int32 B, bins (B, W, bytes), i32 segment (B, W), kept_slot (K), kept_window (K)
// Both little-endian, without padding.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "select_pack/select_pack_kernel.h"

namespace {

using stts::SelectPackShape;
using stts::SelectPackTensors;

constexpr int kPoison = 0xA5;  // in every byte of device memory before a run

void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
    }
}
#define STTS_CHECK(call) check((call), #call)

// Device memory that is freed with its owner.
class Buffer {
  public:
    explicit Buffer(size_t bytes) : bytes_(bytes) {
        const size_t allocated = std::max<size_t>(bytes, 1);
        STTS_CHECK(cudaMalloc(&data_, allocated));
        static const bool poisons = std::getenv("STTS_NO_POISON") == nullptr;
        if (poisons) STTS_CHECK(cudaMemset(data_, kPoison, allocated));
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    template <class T = void>
    T* as() const {
        return static_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }
    void upload(const void* source) {
        STTS_CHECK(cudaMemcpy(data_, source, bytes_, cudaMemcpyHostToDevice));
    }
    std::vector<char> download(size_t bytes) const {
        std::vector<char> copy(bytes);
        STTS_CHECK(cudaMemcpy(copy.data(), data_, bytes, cudaMemcpyDeviceToHost));
        return copy;
    }

  private:
    size_t bytes_;
    void* data_ = nullptr;
};

// All device memory of one clip.
struct Clip {
    explicit Clip(const SelectPackShape& clip_shape)
        : shape(clip_shape),
          clip_windows(static_cast<size_t>(shape.frames) * static_cast<size_t>(shape.windows)),
          slots(static_cast<size_t>(stts::maxBins(shape.frames, shape.windows, shape.kept) *
                                    shape.windows)),
          scores(clip_windows * sizeof(float)),
          hidden(clip_windows * window_bytes()),
          bins(slots * window_bytes()),
          segment(slots * sizeof(int32_t)),
          kept_slot(static_cast<size_t>(shape.kept) * sizeof(int32_t)),
          kept_window(static_cast<size_t>(shape.kept) * sizeof(int32_t)),
          bin_count(sizeof(int32_t)),
          workspace(stts::selectPackWorkspaceBytes(shape.frames, shape.windows)) {}

    size_t window_bytes() const { return static_cast<size_t>(shape.window_bytes); }
    SelectPackTensors tensors() const {
        return {scores.as<float>(),     hidden.as<>(),           bins.as<>(),
                segment.as<int32_t>(),  kept_slot.as<int32_t>(), kept_window.as<int32_t>(),
                bin_count.as<int32_t>()};
    }
    int32_t downloadBinCount() const {
        int32_t bins_used = 0;
        STTS_CHECK(
            cudaMemcpy(&bins_used, bin_count.as<>(), sizeof bins_used, cudaMemcpyDeviceToHost));
        return bins_used;
    }

    SelectPackShape shape;
    size_t clip_windows;  // T*W
    size_t slots;         // of the largest B there can be
    Buffer scores, hidden, bins, segment, kept_slot, kept_window, bin_count, workspace;
};

std::vector<char> readBytes(std::istream& file, size_t bytes) {
    std::vector<char> data(bytes);
    file.read(data.data(), static_cast<std::streamsize>(bytes));
    if (!file) throw std::runtime_error("the file of cases ends early");
    return data;
}

void writeBytes(std::ostream& file, const std::vector<char>& data) {
    file.write(data.data(), static_cast<std::streamsize>(data.size()));
}

void run(const char* cases, const char* results) {
    std::ifstream in(cases, std::ios::binary);
    std::ofstream out(results, std::ios::binary);
    if (!in || !out) throw std::runtime_error("cannot open the files");
    while (in.peek() != std::ifstream::traits_type::eof()) {
        int32_t header[5];
        std::memcpy(header, readBytes(in, sizeof header).data(), sizeof header);
        Clip clip({header[0], header[1], header[3], header[2], header[4] != 0});
        clip.scores.upload(readBytes(in, clip.scores.bytes()).data());
        clip.hidden.upload(readBytes(in, clip.hidden.bytes()).data());
        STTS_CHECK(
            stts::launchSelectPack(clip.shape, clip.tensors(), clip.workspace.as<>(), nullptr));
        STTS_CHECK(cudaDeviceSynchronize());
        const int32_t bins = clip.downloadBinCount();
        const size_t used = static_cast<size_t>(bins) * static_cast<size_t>(clip.shape.windows);
        if (bins < 0 || used > clip.slots) throw std::runtime_error("bin_count is out of bounds");
        out.write(reinterpret_cast<const char*>(&bins), sizeof bins);
        writeBytes(out, clip.bins.download(used * clip.window_bytes()));
        writeBytes(out, clip.segment.download(used * sizeof(int32_t)));
        writeBytes(out, clip.kept_slot.download(clip.kept_slot.bytes()));
        writeBytes(out, clip.kept_window.download(clip.kept_window.bytes()));
    }
    if (!out.flush()) throw std::runtime_error("the results cannot be written");
}

class Events {
  public:
    Events() {
        STTS_CHECK(cudaEventCreate(&start_));
        STTS_CHECK(cudaEventCreate(&stop_));
    }
    ~Events() {
        cudaEventDestroy(start_);
        cudaEventDestroy(stop_);
    }
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;

    template <class Work>
    float milliseconds(Work work) {
        STTS_CHECK(cudaEventRecord(start_, nullptr));
        work();
        STTS_CHECK(cudaEventRecord(stop_, nullptr));
        STTS_CHECK(cudaEventSynchronize(stop_));
        float elapsed = 0;
        STTS_CHECK(cudaEventElapsedTime(&elapsed, start_, stop_));
        return elapsed;
    }

  private:
    cudaEvent_t start_ = nullptr;
    cudaEvent_t stop_ = nullptr;
};

float median(std::vector<float> values) {
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

// Several clips take turns, so that a clip's data is not in the cache when its turn comes.
std::vector<std::unique_ptr<Clip>> randomClips(const SelectPackShape& shape) {
    cudaDeviceProp device{};
    int id = 0;
    STTS_CHECK(cudaGetDevice(&id));
    STTS_CHECK(cudaGetDeviceProperties(&device, id));
    std::mt19937 generator(7);
    std::uniform_real_distribution<float> score(0.0F, 1.0F);
    std::vector<std::unique_ptr<Clip>> clips;
    size_t bytes = 0;
    while (clips.size() < 2 ||
           (bytes < 4 * static_cast<size_t>(device.l2CacheSize) && clips.size() < 16)) {
        auto clip = std::make_unique<Clip>(shape);
        std::vector<float> scores(clip->clip_windows);
        for (float& value : scores) value = score(generator);
        std::vector<uint32_t> hidden((clip->hidden.bytes() + 3) / 4);
        for (uint32_t& value : hidden) value = static_cast<uint32_t>(generator());
        clip->scores.upload(scores.data());
        clip->hidden.upload(hidden.data());
        bytes += clip->hidden.bytes();
        clips.push_back(std::move(clip));
    }
    return clips;
}

void time(const SelectPackShape& shape, int repeats) {
    const auto clips = randomClips(shape);
    Events events;
    std::vector<float> plan, gather, both, copy;
    int32_t bins = 0;
    size_t copied = 0;  // bytes that the plain copy writes: as many as the gather writes
    for (int repeat = -static_cast<int>(clips.size()); repeat < repeats; ++repeat) {
        const Clip& clip =
            *clips[static_cast<size_t>(repeat + 64 * static_cast<int>(clips.size())) %
                   clips.size()];
        const SelectPackTensors tensors = clip.tensors();
        void* workspace = clip.workspace.as<>();
        const float planned = events.milliseconds(
            [&] { STTS_CHECK(stts::launchPlan(shape, tensors, workspace, nullptr)); });
        bins = clip.downloadBinCount();
        copied =
            static_cast<size_t>(bins) * static_cast<size_t>(shape.windows) * clip.window_bytes();
        const float gathered = events.milliseconds(
            [&] { STTS_CHECK(stts::launchGather(shape, tensors, workspace, nullptr)); });
        const float plain = events.milliseconds([&] {
            STTS_CHECK(cudaMemcpyAsync(tensors.bins, tensors.hidden,
                                       std::min(copied, clip.hidden.bytes()),
                                       cudaMemcpyDeviceToDevice, nullptr));
        });
        const float together = events.milliseconds(
            [&] { STTS_CHECK(stts::launchSelectPack(shape, tensors, workspace, nullptr)); });
        if (repeat < 0) continue;  // warm-up: every clip once
        plan.push_back(planned);
        gather.push_back(gathered);
        copy.push_back(plain);
        both.push_back(together);
    }
    std::printf(
        "{\"frames\": %d, \"windows\": %d, \"window_bytes\": %d, \"kept\": %d, \"bins\": %d, "
        "\"bytes\": %zu, \"clips\": %zu, \"repeats\": %d, \"plan_ms\": %.5f, \"gather_ms\": %.5f, "
        "\"select_pack_ms\": %.5f, \"copy_ms\": %.5f}\n",
        shape.frames, shape.windows, shape.window_bytes, shape.kept, bins, copied, clips.size(),
        repeats, static_cast<double>(median(plan)), static_cast<double>(median(gather)),
        static_cast<double>(median(both)), static_cast<double>(median(copy)));
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string verb = argc > 1 ? argv[1] : "";
    if (verb == "run" && argc == 4) {
        run(argv[2], argv[3]);
        return 0;
    }
    if (verb == "time" && argc == 7) {
        const int repeats = std::atoi(argv[6]);
        const SelectPackShape shape{std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[5]),
                                    std::atoi(argv[4]), true};
        const bool valid = shape.frames > 0 && shape.windows > 0 && shape.window_bytes > 0 &&
                           shape.kept > 0 && shape.kept <= shape.frames * shape.windows &&
                           repeats > 0;
        if (!valid) throw std::runtime_error("sizes must be positive, and K at most T*W");
        time(shape, repeats);
        return 0;
    }
    std::fprintf(stderr,
                 "usage: select_pack_device run CASES RESULTS\n"
                 "       select_pack_device time T W WINDOW_BYTES K REPEATS\n");
    return 2;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
