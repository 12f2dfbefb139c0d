// The whole plugin, driven through its virtual functions, against the serial plan and a plain copy.
#include "emulated_plugin.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "plan_cpu.h"

namespace {

struct Clip {
    int32_t frames, windows, kept, patches, width, refill, hidden_type;
};

struct Packed {
    explicit Packed(const Clip& clip)
        : bins(std::min(clip.frames, 2 * clip.kept / clip.windows + 1)),
          segment(static_cast<size_t>(bins * clip.windows)),
          slot_window(segment.size()),
          kept_slot(static_cast<size_t>(clip.kept)),
          kept_window(static_cast<size_t>(clip.kept)) {}

    int32_t bins;
    std::vector<int32_t> segment, slot_window, kept_slot, kept_window;
    int32_t bin_count = 0;
};

size_t windowBytes(const Clip& clip) {
    const int32_t element_bytes = clip.hidden_type == STTS_FLOAT32 ? 4 : 2;
    return static_cast<size_t>(clip.patches * clip.width * element_bytes);
}

std::vector<uint8_t> gather(const Clip& clip, const Packed& plan,
                            const std::vector<uint8_t>& hidden) {
    const size_t bytes = windowBytes(clip);
    std::vector<uint8_t> bins(static_cast<size_t>(plan.bin_count * clip.windows) * bytes, 0);
    for (size_t slot = 0; slot * bytes < bins.size(); ++slot) {
        if (plan.slot_window[slot] < 0) continue;
        const auto window = static_cast<size_t>(plan.slot_window[slot]);
        std::memcpy(&bins[slot * bytes], &hidden[window * bytes], bytes);
    }
    return bins;
}

bool startsWith(const std::vector<int32_t>& values, const std::vector<int32_t>& expected,
                int32_t count) {
    return std::equal(expected.begin(), expected.begin() + count, values.begin());
}

void equalsSerialPlan(const Clip& clip, std::mt19937& random) {
    std::vector<float> scores(static_cast<size_t>(clip.frames * clip.windows));
    for (float& score : scores) score = static_cast<float>(random() % 16) / 16.0F;
    std::vector<uint8_t> hidden(scores.size() * windowBytes(clip));
    for (uint8_t& byte : hidden) byte = static_cast<uint8_t>(random());

    Packed expected(clip);
    const SttsPlanInput input{scores.data(), clip.frames, clip.windows, clip.kept, clip.refill};
    const SttsPlanOutput output{expected.segment.data(), expected.slot_window.data(),
                                expected.kept_slot.data(), expected.kept_window.data(),
                                &expected.bin_count};
    CHECK(stts_plan_serial(&input, &output) == 0);

    Packed given(clip);
    std::vector<uint8_t> bins(given.segment.size() * windowBytes(clip), 0xEE);
    CHECK(stts_emulated_select_pack(scores.data(), hidden.data(), clip.hidden_type, clip.frames,
                                    clip.windows, clip.patches, clip.width, clip.kept, clip.refill,
                                    bins.data(), given.segment.data(), given.kept_slot.data(),
                                    given.kept_window.data(), &given.bin_count) == 0);
    CHECK(given.bin_count == expected.bin_count);
    CHECK(startsWith(given.segment, expected.segment, expected.bin_count * clip.windows));
    CHECK(given.kept_slot == expected.kept_slot);
    CHECK(given.kept_window == expected.kept_window);
    const std::vector<uint8_t> packed = gather(clip, expected, hidden);
    CHECK(std::equal(packed.begin(), packed.end(), bins.begin()));
}

}  // namespace

int main() {
    std::mt19937 random(1);
    const auto from = [&](uint32_t least, uint32_t most) {
        return static_cast<int32_t>(least + random() % (most - least + 1));
    };
    for (int32_t i = 0; i < 30; ++i) {
        Clip clip{from(1, 20), from(1, 30), 0, from(1, 4), from(1, 20), i % 2, i % 3};
        clip.kept = from(1, static_cast<uint32_t>(clip.frames * clip.windows));
        stts_emulation_schedule(static_cast<uint32_t>(i));
        equalsSerialPlan(clip, random);
    }
    return stts::exitCode();
}
