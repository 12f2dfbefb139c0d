// The host side of SttsSelectPack: what it tells TensorRT, and everything that it must refuse with
// a status and a message. Argument: a library made of fake_tensorrt.cpp.
#include "select_pack/select_pack_plugin.h"

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "check.h"
#include "emulation/emulator.h"
#include "fake_expressions.h"
#include "fake_tensorrt.h"
#include "plugin_log.h"
#include "select_pack/select_pack_creator.h"
#include "select_pack/select_pack_kernel.h"
#include "tensorrt.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

constexpr int32_t kOutputs = 5;

const stts::FakeTensorRT* tensorrt = nullptr;

void expectMessage(const char* expected) {
    if (!CHECK(std::strstr(tensorrt->lastMessage(), expected) != nullptr)) {
        std::fprintf(stderr, "  message: '%s', expected: '%s'\n", tensorrt->lastMessage(),
                     expected);
    }
    tensorrt->clear();
}

stts::SelectPackCreator& creator() {
    static stts::SelectPackCreator instance;
    return instance;
}

std::unique_ptr<IPluginV3> create(const PluginFieldCollection* fields,
                                  TensorRTPhase phase = TensorRTPhase::kBUILD) {
    return std::unique_ptr<IPluginV3>(creator().createPlugin("name", fields, phase));
}

std::unique_ptr<IPluginV3> createWith(const PluginField& field) {
    const PluginFieldCollection fields{1, &field};
    return create(&fields);
}

std::unique_ptr<IPluginV3> createDefault() {
    const PluginFieldCollection fields{0, nullptr};
    return create(&fields);
}

template <class Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

IPluginV3OneBuild& buildOf(IPluginV3& plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime& runtimeOf(IPluginV3& plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

int32_t refillOf(IPluginV3& plugin) {
    const PluginFieldCollection& fields = *runtimeOf(plugin).getFieldsToSerialize();
    CHECK(fields.nbFields == 1 && std::strcmp(fields.fields[0].name, "refill") == 0);
    CHECK(fields.fields[0].type == PluginFieldType::kINT32 && fields.fields[0].length == 1);
    int32_t value = -1;
    std::memcpy(&value, fields.fields[0].data, sizeof value);
    return value;
}

bool isInterface(const nvinfer1::InterfaceInfo& info, const char* kind) {
    return std::strcmp(info.kind, kind) == 0 && info.major == 1 && info.minor == 0;
}

void tellsWhoItIs() {
    CHECK(isInterface(creator().getInterfaceInfo(), "PLUGIN CREATOR_V3ONE"));
    CHECK(std::strcmp(creator().getPluginName(), "SttsSelectPack") == 0);
    CHECK(std::strcmp(creator().getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(creator().getPluginNamespace(), "stts") == 0);
    CHECK(creator().getFieldNames()->nbFields == 1);
    CHECK(std::strcmp(creator().getFieldNames()->fields[0].name, "refill") == 0);

    const auto plugin = createDefault();
    CHECK(isInterface(plugin->getInterfaceInfo(), "PLUGIN"));
    auto& core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
    CHECK(isInterface(core.getInterfaceInfo(), "PLUGIN_V3ONE_CORE"));
    CHECK(std::strcmp(core.getPluginName(), "SttsSelectPack") == 0);
    CHECK(std::strcmp(core.getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(core.getPluginNamespace(), "stts") == 0);
    CHECK(isInterface(buildOf(*plugin).getInterfaceInfo(), "PLUGIN_V3ONE_BUILD"));
    CHECK(isInterface(runtimeOf(*plugin).getInterfaceInfo(), "PLUGIN_V3ONE_RUNTIME"));
    CHECK(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(7)) == nullptr);
    CHECK(buildOf(*plugin).getNbOutputs() == kOutputs);
    CHECK(buildOf(*plugin).getNbTactics() == 0);
}

void takesItsAttribute() {
    CHECK(refillOf(*createDefault()) == 1);
    for (const int32_t refill : {0, 1}) {
        const auto plugin = createWith(PluginField("refill", &refill, PluginFieldType::kINT32, 1));
        CHECK(plugin && refillOf(*plugin) == refill);
        const char* expected = refill == 1 ? "refill=1" : "refill=0";
        CHECK(std::strcmp(buildOf(*plugin).getTimingCacheID(), expected) == 0);
        CHECK(std::strcmp(buildOf(*plugin).getMetadataString(), expected) == 0);
    }
}

void refusesAttributes() {
    const int32_t one = 1;
    const int64_t wide = 1;
    CHECK(!create(nullptr));
    expectMessage("no collection of attributes");
    const PluginFieldCollection dangling{1, nullptr};
    CHECK(!create(&dangling));
    expectMessage("no collection of attributes");
    const PluginFieldCollection negative{-1, nullptr};
    CHECK(!create(&negative));
    expectMessage("no collection of attributes");
    CHECK(!createWith(PluginField("refil", &one, PluginFieldType::kINT32, 1)));
    expectMessage("unknown attribute 'refil'; the only attribute is 'refill'");
    CHECK(!createWith(PluginField(nullptr, &one, PluginFieldType::kINT32, 1)));
    expectMessage("unknown attribute ''");
    CHECK(!createWith(PluginField("refill", &wide, PluginFieldType::kINT64, 1)));
    expectMessage("it must be one INT32");
    CHECK(!createWith(PluginField("refill", &one, PluginFieldType::kINT32, 2)));
    expectMessage("length 2; it must be one INT32");
    CHECK(!createWith(PluginField("refill", nullptr, PluginFieldType::kINT32, 1)));
    expectMessage("it must be one INT32");
    for (const int32_t value : {-1, 2}) {
        CHECK(!createWith(PluginField("refill", &value, PluginFieldType::kINT32, 1)));
        expectMessage("it must be 0 or 1");
    }
}

void survivesCopies() {
    for (const int32_t refill : {0, 1}) {
        auto plugin = createWith(PluginField("refill", &refill, PluginFieldType::kINT32, 1));
        const std::unique_ptr<IPluginV3> clone(plugin->clone());
        const std::unique_ptr<IPluginV3> attached(runtimeOf(*plugin).attachToContext(nullptr));
        const auto loaded =
            create(runtimeOf(*plugin).getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        plugin.reset();
        CHECK(refillOf(*clone) == refill);
        CHECK(refillOf(*attached) == refill);
        CHECK(refillOf(*loaded) == refill);
    }
}

void givesTypes() {
    const auto plugin = createDefault();
    for (const DataType hidden : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        for (const int32_t inputs : {2, 3}) {
            const DataType types[] = {DataType::kFLOAT, hidden, DataType::kINT64};
            DataType given[kOutputs] = {};
            CHECK(buildOf(*plugin).getOutputDataTypes(given, kOutputs, types, inputs) == 0);
            CHECK(given[0] == hidden);
            for (int32_t i = 1; i < kOutputs; ++i) CHECK(given[i] == DataType::kINT32);
        }
    }
    const auto refused = [&](std::vector<DataType> types, int32_t outputs) {
        DataType given[kOutputs] = {};
        return buildOf(*plugin).getOutputDataTypes(given, outputs, types.data(),
                                                   static_cast<int32_t>(types.size())) != 0;
    };
    CHECK(refused({DataType::kHALF, DataType::kHALF}, kOutputs));
    expectMessage("scores has type 1");
    CHECK(refused({DataType::kFLOAT, DataType::kINT8}, kOutputs));
    expectMessage("hidden has type 2");
    CHECK(refused({DataType::kFLOAT, DataType::kHALF, DataType::kINT32}, kOutputs));
    expectMessage("kept_count has type 3");
    CHECK(refused({DataType::kFLOAT}, kOutputs));
    expectMessage("1 inputs and 5 outputs");
    CHECK(refused({DataType::kFLOAT, DataType::kHALF}, 4));
    expectMessage("2 inputs and 4 outputs");
}

bool isShape(const DimsExprs& shape, const std::vector<int64_t>& values) {
    if (shape.nbDims != static_cast<int32_t>(values.size())) return false;
    for (size_t i = 0; i < values.size(); ++i) {
        if (stts::valueOf(*shape.d[i]) != values[i]) return false;
    }
    return true;
}

void givesShapes() {
    const auto plugin = createDefault();
    for (const int32_t inputs : {2, 3}) {
        stts::FakeBuilder builder;
        const DimsExprs in[] = {builder.dims({10, 9}), builder.dims({10, 36, 16}),
                                builder.dims({1})};
        const DimsExprs kept = builder.dims({20});
        DimsExprs out[kOutputs] = {};
        CHECK(buildOf(*plugin).getOutputShapes(in, inputs, &kept, 1, out, kOutputs, builder) == 0);
        CHECK(builder.sizeTensor() == 4);
        CHECK(builder.sizeOpt() == 3);    // ceil(20 / 9)
        CHECK(builder.sizeUpper() == 5);  // min(10, 2 * 20 / 9 + 1)
        CHECK(isShape(out[0], {5, 36, 16}) && isShape(out[1], {5, 9}));
        CHECK(isShape(out[2], {20}) && isShape(out[3], {20}) && isShape(out[4], {}));
        CHECK(out[0].d[0]->isSizeTensor() && out[1].d[0]->isSizeTensor());
    }
}

void refusesShapes() {
    const auto plugin = createDefault();
    stts::FakeBuilder builder;
    const auto refused = [&](const std::vector<DimsExprs>& in, const std::vector<DimsExprs>& shapes,
                             int32_t outputs) {
        DimsExprs out[kOutputs] = {};
        return buildOf(*plugin).getOutputShapes(in.data(), static_cast<int32_t>(in.size()),
                                                shapes.data(), static_cast<int32_t>(shapes.size()),
                                                out, outputs, builder) != 0;
    };
    const DimsExprs scores = builder.dims({10, 9});
    const DimsExprs hidden = builder.dims({10, 36, 16});
    const DimsExprs kept = builder.dims({20});
    CHECK(refused({scores, hidden}, {}, kOutputs));
    expectMessage("kept_count must be the only shape tensor");
    CHECK(refused({scores, hidden}, {kept, kept}, kOutputs));
    expectMessage("kept_count must be the only shape tensor");
    CHECK(refused({scores, hidden}, {builder.dims({20, 1})}, kOutputs));
    expectMessage("hold one value");
    CHECK(refused({builder.dims({90}), hidden}, {kept}, kOutputs));
    expectMessage("scores has 1 dimensions; it must have 2");
    CHECK(refused({scores, builder.dims({360, 16})}, {kept}, kOutputs));
    expectMessage("hidden has 2 dimensions; it must have 3");
    CHECK(refused({scores}, {kept}, kOutputs));
    expectMessage("getOutputShapes: 1 inputs and 5 outputs");
    CHECK(refused({scores, hidden}, {kept}, 6));
    expectMessage("2 inputs and 6 outputs");
    builder.throwForSizeTensors();
    CHECK(refused({scores, hidden}, {kept}, kOutputs));
    expectMessage("could not express the number of bins");
    builder.refuseOperations();
    CHECK(refused({scores, hidden}, {kept}, kOutputs));
    expectMessage("could not express the number of bins");
}

// The types that TensorRT may try, for `tensor` of 3 inputs and 5 outputs.
bool isExpectedType(int32_t tensor, DataType type, DataType hidden) {
    if (tensor == 0) return type == DataType::kFLOAT;
    if (tensor == 1) {
        return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    }
    if (tensor == 2) return type == DataType::kINT64;
    if (tensor == 3) return type == hidden;
    return type == DataType::kINT32;
}

void supportsFormats() {
    const auto plugin = createDefault();
    for (const int32_t inputs : {2, 3}) {
        for (int32_t pos = 0; pos < inputs + kOutputs; ++pos) {
            const int32_t tensor = pos < inputs ? pos : pos - inputs + 3;
            for (int32_t type = 0; type <= 8; ++type) {
                for (const DataType hidden : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
                    for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2}) {
                        std::array<DynamicPluginTensorDesc, 3 + kOutputs> in_out{};
                        in_out[1].desc.type = hidden;
                        DynamicPluginTensorDesc& asked = in_out[static_cast<size_t>(pos)];
                        asked.desc.type = static_cast<DataType>(type);
                        asked.desc.format = format;
                        const bool expected = format == TensorFormat::kLINEAR &&
                                              isExpectedType(tensor, asked.desc.type, hidden);
                        CHECK(buildOf(*plugin).supportsFormatCombination(pos, in_out.data(), inputs,
                                                                         kOutputs) == expected);
                    }
                }
            }
        }
    }
    std::array<DynamicPluginTensorDesc, 3 + kOutputs> in_out{};
    CHECK(!buildOf(*plugin).supportsFormatCombination(-1, in_out.data(), 2, kOutputs));
    CHECK(!buildOf(*plugin).supportsFormatCombination(7, in_out.data(), 2, kOutputs));
    CHECK(!buildOf(*plugin).supportsFormatCombination(0, in_out.data(), 1, kOutputs));
    expectMessage("supportsFormatCombination: 1 inputs");
}

Dims dims(const std::vector<int64_t>& values) {
    Dims result{};
    result.nbDims = static_cast<int32_t>(values.size());
    for (size_t i = 0; i < values.size(); ++i) result.d[i] = values[i];
    return result;
}

constexpr size_t kTokens = 2 * 12 * 8;
constexpr uint16_t kUntouched = 0xEEEE;  // what no token is

// A clip of 2 frames of 4 windows of 3 patches, 8 wide; 5 windows are kept. Its windows have 48
// bytes, so that the addresses alone decide how wide accesses can be.
struct Clip {
    std::array<PluginTensorDesc, 2> in{};
    std::array<PluginTensorDesc, kOutputs> out{};
    std::vector<float> scores{0, 0, 0, 0, 9, 1, 8, 2};
    alignas(16) std::array<uint16_t, kTokens + 8> hidden{};
    alignas(16) std::array<uint16_t, kTokens + 8> bins{};
    std::array<int32_t, 8> segment{};
    std::array<int32_t, 5> kept_slot{};
    std::array<int32_t, 5> kept_window{};
    int32_t bin_count = 0;
    std::vector<int32_t> workspace;
    std::array<const void*, 2> inputs{scores.data(), hidden.data()};
    std::array<void*, kOutputs> outputs{bins.data(), segment.data(), kept_slot.data(),
                                        kept_window.data(), &bin_count};

    Clip() {
        const auto describe = [](std::vector<int64_t> shape, DataType type) {
            return PluginTensorDesc{dims(shape), type, TensorFormat::kLINEAR, 1.0F};
        };
        in = {describe({2, 4}, DataType::kFLOAT), describe({2, 12, 8}, DataType::kHALF)};
        out = {describe({2, 12, 8}, DataType::kHALF), describe({2, 4}, DataType::kINT32),
               describe({5}, DataType::kINT32), describe({5}, DataType::kINT32),
               describe({}, DataType::kINT32)};
        workspace.resize(stts::selectPackWorkspaceBytes(2, 4) / sizeof(int32_t));
        for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = static_cast<uint16_t>(i + 1);
        bins.fill(kUntouched);
    }

    int32_t enqueue(IPluginV3& plugin) {
        return runtimeOf(plugin).enqueue(in.data(), out.data(), inputs.data(), outputs.data(),
                                         workspace.data(), nullptr);
    }
    int32_t change(IPluginV3& plugin) {
        return runtimeOf(plugin).onShapeChange(in.data(), 2, out.data(), kOutputs);
    }
    std::array<DynamicPluginTensorDesc, 2> dynamicInputs() const {
        return {DynamicPluginTensorDesc{in[0], in[0].dims, in[0].dims, in[0].dims},
                DynamicPluginTensorDesc{in[1], in[1].dims, in[1].dims, in[1].dims}};
    }
    int32_t configure(IPluginV3& plugin) {
        const auto dynamic = dynamicInputs();
        return buildOf(plugin).configurePlugin(dynamic.data(), 2, nullptr, kOutputs);
    }
    size_t workspaceBytes(IPluginV3& plugin) {
        const auto dynamic = dynamicInputs();
        return buildOf(plugin).getWorkspaceSize(dynamic.data(), 2, nullptr, kOutputs);
    }
};

// With hidden and bins so many values past an address of 16 bytes' alignment.
void runsAt(IPluginV3& plugin, size_t hidden, size_t bins) {
    Clip clip;
    clip.inputs[1] = clip.hidden.data() + hidden;
    clip.outputs[0] = clip.bins.data() + bins;
    const int64_t launches = emulation::launches();
    CHECK(clip.configure(plugin) == 0 && clip.change(plugin) == 0);
    CHECK(clip.workspaceBytes(plugin) == clip.workspace.size() * sizeof(int32_t));
    CHECK(clip.enqueue(plugin) == 0);
    CHECK(emulation::launches() == launches + 2);
    // Frame 0 keeps its 4 windows, frame 1 its best; alone in its bin, it is refilled.
    CHECK(clip.bin_count == 2);
    CHECK((clip.segment == std::array<int32_t, 8>{0, 0, 0, 0, 1, 1, 1, 1}));
    CHECK((clip.kept_window == std::array<int32_t, 5>{0, 1, 2, 3, 4}));
    CHECK((clip.kept_slot == std::array<int32_t, 5>{0, 1, 2, 3, 4}));
    for (size_t i = 0; i < clip.bins.size(); ++i) {
        const bool is_inside = bins <= i && i < bins + kTokens;
        CHECK(clip.bins[i] == (is_inside ? clip.hidden[i - bins + hidden] : kUntouched));
    }
}

void runs() {
    const auto plugin = createDefault();
    for (const size_t hidden : {0, 1, 2, 4}) {  // accesses of 16, 2, 4 and 8 bytes
        for (const size_t bins : {0, 1, 2, 4}) runsAt(*plugin, hidden, bins);
    }
}

// Every way to hand over a clip that is not one, and what the message must say.
void refusesClips() {
    struct Case {
        const char* message;
        std::function<void(Clip&)> spoil;
        int64_t launches = 0;  // tried before the refusal
    };
    const std::vector<Case> shapes = {
        {"scores has 1 dimensions; it must have 2", [](Clip& c) { c.in[0].dims = dims({8}); }},
        {"hidden has 4 dimensions; it must have 3",
         [](Clip& c) { c.in[1].dims = dims({2, 4, 3, 8}); }},
        {"the number of frames is 0; it must be in 1..4096",
         [](Clip& c) { c.in[0].dims.d[0] = 0; }},
        {"the number of frames is 4097", [](Clip& c) { c.in[0].dims.d[0] = 4097; }},
        {"the number of windows is -1", [](Clip& c) { c.in[0].dims.d[1] = -1; }},
        {"the number of windows is 4097", [](Clip& c) { c.in[0].dims.d[1] = 4097; }},
        {"the number of patches is 0", [](Clip& c) { c.in[1].dims.d[1] = 0; }},
        {"the width is 0", [](Clip& c) { c.in[1].dims.d[2] = 0; }},
        {"scores is (2, 4) and hidden (3, 12, 8)", [](Clip& c) { c.in[1].dims.d[0] = 3; }},
        {"they must be (T, W) and (T, W*G, D)", [](Clip& c) { c.in[1].dims.d[1] = 13; }},
        {"the size of a window is 2147483646; it must be in 1..1073741823",
         [](Clip& c) { c.in[1].dims.d[2] = 715827882; }},
    };
    const std::vector<Case> runtime_only = {
        {"scores has type 1", [](Clip& c) { c.in[0].type = DataType::kHALF; }},
        {"hidden has type 3", [](Clip& c) { c.in[1].type = DataType::kINT32; }},
        {"hidden has type 1 in format 1", [](Clip& c) { c.in[1].format = TensorFormat::kCHW2; }},
        {"bins has type 7", [](Clip& c) { c.out[0].type = DataType::kBF16; }},
        {"segment has type 8", [](Clip& c) { c.out[1].type = DataType::kINT64; }},
        {"bin_count has type 0", [](Clip& c) { c.out[4].type = DataType::kFLOAT; }},
        {"kept_slot has 2 dimensions", [](Clip& c) { c.out[2].dims = dims({5, 1}); }},
        {"kept_window has 0 dimensions", [](Clip& c) { c.out[3].dims = dims({}); }},
        {"the number of kept windows is 0; it must be in 1..8",
         [](Clip& c) { c.out[2].dims.d[0] = 0; }},
        {"the number of kept windows is 9", [](Clip& c) { c.out[2].dims.d[0] = 9; }},
        {"kept_slot has 5 values and kept_window 4", [](Clip& c) { c.out[3].dims.d[0] = 4; }},
        {"scores has no memory", [](Clip& c) { c.inputs[0] = nullptr; }},
        {"hidden has no memory", [](Clip& c) { c.inputs[1] = nullptr; }},
        {"bins has no memory", [](Clip& c) { c.outputs[0] = nullptr; }},
        {"bin_count has no memory", [](Clip& c) { c.outputs[4] = nullptr; }},
        {"there is no workspace", [](Clip& c) { std::vector<int32_t>().swap(c.workspace); }},
        {"misaligned address",
         [](Clip& c) { c.outputs[1] = static_cast<char*>(c.outputs[1]) + 2; }},
        {"misaligned address",
         [](Clip& c) { c.inputs[1] = static_cast<const char*>(c.inputs[1]) + 1; }},
        {"no CUDA-capable device", [](Clip&) { emulation::failLaunch(0, cudaErrorNoDevice); }, 1},
        {"launch failure", [](Clip&) { emulation::failLaunch(1, cudaErrorLaunchFailure); }, 2},
    };
    const auto plugin = createDefault();
    for (const Case& one : shapes) {
        Clip clip;
        one.spoil(clip);
        CHECK(clip.configure(*plugin) != 0);
        expectMessage(one.message);
        CHECK(clip.workspaceBytes(*plugin) == 0);
        expectMessage(one.message);
        CHECK(clip.change(*plugin) != 0);
        expectMessage(one.message);
        CHECK(clip.enqueue(*plugin) != 0);
        expectMessage(one.message);
    }
    for (const Case& one : runtime_only) {
        Clip clip;
        one.spoil(clip);
        const int64_t launches = emulation::launches();
        CHECK(clip.enqueue(*plugin) != 0);
        expectMessage(one.message);
        CHECK(emulation::launches() == launches + one.launches);
    }
    const Clip clip;
    const auto dynamic = clip.dynamicInputs();
    CHECK(buildOf(*plugin).configurePlugin(dynamic.data(), 4, nullptr, kOutputs) != 0);
    expectMessage("configurePlugin: 4 inputs and 5 outputs");
    CHECK(buildOf(*plugin).getWorkspaceSize(dynamic.data(), 2, nullptr, 3) == 0);
    expectMessage("getWorkspaceSize: 2 inputs and 3 outputs");
    CHECK(runtimeOf(*plugin).onShapeChange(clip.in.data(), 0, clip.out.data(), kOutputs) != 0);
    expectMessage("onShapeChange: 0 inputs and 5 outputs");
}

void sizesWorkspace() {
    CHECK(stts::selectPackWorkspaceBytes(1, 1) == (6 + 1 + 1) * sizeof(int32_t));
    CHECK(stts::selectPackWorkspaceBytes(128, 81) == (6 * 128 + 1 + 128 * 81) * sizeof(int32_t));
    CHECK(stts::selectPackWorkspaceBytes(128, 81) == 44548);  // as in README.md
    CHECK(stts::maxBins(10, 9, 20) == 5 && stts::maxBins(4, 9, 20) == 4);
}

}  // namespace

int main(int count, char** libraries) {
    if (!CHECK(count == 2)) return stts::exitCode();
    const stts::FakeTensorRT fake(libraries[1]);
    tensorrt = &fake;
    stts::rememberLoggerFinder(fake.finder());
    tellsWhoItIs();
    takesItsAttribute();
    refusesAttributes();
    survivesCopies();
    givesTypes();
    givesShapes();
    refusesShapes();
    supportsFormats();
    runs();
    refusesClips();
    sizesWorkspace();
    return stts::exitCode();
}
