#include "emulated_plugin.h"

#include <array>
#include <memory>
#include <optional>

#include "emulation/emulator.h"
#include "fake_expressions.h"
#include "guarded_buffer.h"
#include "tensorrt.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kInputs = 2;
constexpr int32_t kOutputs = 5;
constexpr DataType kHiddenTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

nvinfer1::IPluginCreatorV3One& creator() {
    int32_t count = 0;
    return *static_cast<nvinfer1::IPluginCreatorV3One*>(getCreators(count)[0]);
}

std::unique_ptr<IPluginV3> makePlugin(int32_t refill) {
    const nvinfer1::PluginField field("refill", &refill, nvinfer1::PluginFieldType::kINT32, 1);
    const nvinfer1::PluginFieldCollection fields{1, &field};
    return std::unique_ptr<IPluginV3>(
        creator().createPlugin("select_pack", &fields, nvinfer1::TensorRTPhase::kBUILD));
}

PluginTensorDesc describe(const nvinfer1::DimsExprs& shape, DataType type) {
    PluginTensorDesc desc{};
    desc.dims.nbDims = shape.nbDims;
    for (int32_t i = 0; i < shape.nbDims; ++i) desc.dims.d[i] = stts::valueOf(*shape.d[i]);
    desc.type = type;
    return desc;
}

struct Tensors {
    std::array<PluginTensorDesc, kInputs> inputs;
    std::array<PluginTensorDesc, kOutputs> outputs;
    size_t workspace_bytes;
};

// What TensorRT does while it builds an engine; nothing if the plugin refuses.
std::optional<Tensors> build(IPluginV3& plugin, const nvinfer1::DimsExprs* input_shapes,
                             const nvinfer1::DimsExprs& kept, DataType hidden,
                             stts::FakeBuilder& builder) {
    auto& core = *static_cast<IPluginV3OneBuild*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    const DataType input_types[kInputs] = {DataType::kFLOAT, hidden};
    DataType output_types[kOutputs] = {};
    nvinfer1::DimsExprs output_shapes[kOutputs] = {};
    if (core.getNbOutputs() != kOutputs ||
        core.getOutputDataTypes(output_types, kOutputs, input_types, kInputs) != 0 ||
        core.getOutputShapes(input_shapes, kInputs, &kept, 1, output_shapes, kOutputs, builder) !=
            0) {
        return std::nullopt;
    }
    Tensors tensors{};
    std::array<DynamicPluginTensorDesc, kInputs + kOutputs> dynamic{};
    for (size_t i = 0; i < dynamic.size(); ++i) {
        PluginTensorDesc& desc = i < kInputs ? tensors.inputs[i] : tensors.outputs[i - kInputs];
        desc = i < kInputs ? describe(input_shapes[i], input_types[i])
                           : describe(output_shapes[i - kInputs], output_types[i - kInputs]);
        dynamic[i] = {desc, desc.dims, desc.dims, desc.dims};
    }
    for (size_t i = 0; i < dynamic.size(); ++i) {
        if (!core.supportsFormatCombination(static_cast<int32_t>(i), dynamic.data(), kInputs,
                                            kOutputs)) {
            return std::nullopt;
        }
    }
    const DynamicPluginTensorDesc* outputs = dynamic.data() + kInputs;
    if (core.configurePlugin(dynamic.data(), kInputs, outputs, kOutputs) != 0) return std::nullopt;
    tensors.workspace_bytes = core.getWorkspaceSize(dynamic.data(), kInputs, outputs, kOutputs);
    return tensors;
}

IPluginV3OneRuntime& runtimeOf(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// Through the engine file into an execution context.
std::unique_ptr<IPluginV3> deploy(IPluginV3& plugin) {
    const auto* fields = runtimeOf(plugin).getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> loaded(
        creator().createPlugin("select_pack", fields, nvinfer1::TensorRTPhase::kRUNTIME));
    if (!loaded) return nullptr;
    return std::unique_ptr<IPluginV3>(runtimeOf(*loaded).attachToContext(nullptr));
}

}  // namespace

int stts_emulated_select_pack(const float* scores, const void* hidden, int hidden_type,
                              int64_t frames, int64_t windows, int64_t patches, int64_t width,
                              int64_t kept, int refill, void* bins, int32_t* segment,
                              int32_t* kept_slot, int32_t* kept_window, int32_t* bin_count) {
    const auto plugin = makePlugin(refill);
    if (!plugin) return STTS_NO_PLUGIN;
    if (hidden_type < STTS_FLOAT32 || hidden_type > STTS_BFLOAT16) return STTS_BUILD_REFUSED;

    stts::FakeBuilder builder;
    const nvinfer1::DimsExprs input_shapes[kInputs] = {
        builder.dims({frames, windows}), builder.dims({frames, windows * patches, width})};
    auto tensors =
        build(*plugin, input_shapes, builder.dims({kept}), kHiddenTypes[hidden_type], builder);
    if (!tensors) return STTS_BUILD_REFUSED;
    const auto deployed = deploy(*plugin);
    if (!deployed) return STTS_NO_PLUGIN;

    IPluginV3OneRuntime& runtime = runtimeOf(*deployed);
    stts::GuardedBuffer workspace(tensors->workspace_bytes);
    const void* const inputs[kInputs] = {scores, hidden};
    void* const outputs[kOutputs] = {bins, segment, kept_slot, kept_window, bin_count};
    if (runtime.onShapeChange(tensors->inputs.data(), kInputs, tensors->outputs.data(), kOutputs) !=
        0) {
        return STTS_BUILD_REFUSED;
    }
    const int status = runtime.enqueue(tensors->inputs.data(), tensors->outputs.data(), inputs,
                                       outputs, workspace.data(), nullptr);
    if (status != 0) return status;
    return workspace.isIntact() ? 0 : STTS_GUARD_DAMAGED;
}

void stts_emulation_fail_launch(int32_t others, int32_t error) {
    emulation::failLaunch(others, static_cast<cudaError_t>(error));
}

int64_t stts_emulation_launches() { return emulation::launches(); }

void stts_emulation_schedule(uint32_t seed) { emulation::setSchedule(seed); }

const char* stts_emulation_fault() { return emulation::lastFault(); }
