#include "select_pack/select_pack_plugin.h"

#include <cuda_runtime_api.h>

#include <new>
#include <optional>

#include "plugin_log.h"
#include "select_pack/select_pack_kernel.h"

namespace stts {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kSuccess = 0;
constexpr int32_t kRefused = 1;

// Inputs. TensorRT versions differ in whether the shape tensor kept_count counts as an input in
// other functions than getOutputShapes: two inputs and three are both fine.
constexpr int32_t kScores = 0;     // f32 (T, W)
constexpr int32_t kHidden = 1;     // f32, f16 or bf16 (T, W*G, D)
constexpr int32_t kKeptCount = 2;  // i64 (1): K
constexpr int32_t kInputs = 3;

// Outputs.
constexpr int32_t kBins = 0;        // type of hidden (B, W*G, D)
constexpr int32_t kSegment = 1;     // i32 (B, W)
constexpr int32_t kKeptSlot = 2;    // i32 (K)
constexpr int32_t kKeptWindow = 3;  // i32 (K)
constexpr int32_t kBinCount = 4;    // i32 (): B, a size tensor
constexpr int32_t kOutputs = 5;

constexpr const char* kTensorNames[kInputs + kOutputs] = {
    "scores", "hidden", "kept_count", "bins", "segment", "kept_slot", "kept_window", "bin_count"};

bool areCountsValid(const char* where, int32_t inputs, int32_t outputs) noexcept {
    const bool valid = (inputs == kInputs || inputs == kKeptCount) && outputs == kOutputs;
    if (!valid) {
        logError("%s %s: %d inputs and %d outputs; there must be 2 or 3 and %d", kSelectPackName,
                 where, inputs, outputs, kOutputs);
    }
    return valid;
}

int32_t elementBytes(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT:
            return 4;
        case DataType::kHALF:
        case DataType::kBF16:
            return 2;
        default:
            return 0;
    }
}

// `tensor` counts inputs, then outputs; `hidden` is the type of the tensor of that name.
bool isTypeSupported(int32_t tensor, DataType type, DataType hidden) noexcept {
    switch (tensor) {
        case kScores:
            return type == DataType::kFLOAT;
        case kHidden:
            return elementBytes(type) != 0;
        case kKeptCount:
            return type == DataType::kINT64;
        case kInputs + kBins:
            return type == hidden;
        default:
            return type == DataType::kINT32;
    }
}

bool isSupported(int32_t tensor, const PluginTensorDesc& desc, DataType hidden) noexcept {
    return desc.format == nvinfer1::TensorFormat::kLINEAR &&
           isTypeSupported(tensor, desc.type, hidden);
}

bool areTypesValid(const char* where, const PluginTensorDesc* inputs,
                   const PluginTensorDesc* outputs) noexcept {
    for (int32_t tensor = 0; tensor < kInputs + kOutputs; ++tensor) {
        if (tensor == kKeptCount) continue;
        const PluginTensorDesc& desc =
            tensor < kInputs ? inputs[tensor] : outputs[tensor - kInputs];
        if (!isSupported(tensor, desc, inputs[kHidden].type)) {
            logError(
                "%s %s: %s has type %d in format %d; scores must be FLOAT, hidden FLOAT, HALF or "
                "BF16, bins like hidden, the others INT32, all LINEAR",
                kSelectPackName, where, kTensorNames[tensor], static_cast<int>(desc.type),
                static_cast<int>(desc.format));
            return false;
        }
    }
    return true;
}

bool hasRank(const char* where, int32_t tensor, int32_t rank, int32_t needed) noexcept {
    if (rank != needed) {
        logError("%s %s: %s has %d dimensions; it must have %d", kSelectPackName, where,
                 kTensorNames[tensor], rank, needed);
    }
    return rank == needed;
}

bool isInRange(const char* where, const char* what, int64_t value, int64_t most) noexcept {
    const bool valid = value >= 1 && value <= most;
    if (!valid) {
        logError("%s %s: %s is %lld; it must be in 1..%lld", kSelectPackName, where, what,
                 static_cast<long long>(value), static_cast<long long>(most));
    }
    return valid;
}

// Reads all but K, which only enqueue knows for certain.
std::optional<SelectPackShape> readShape(const char* where, const Dims& scores, const Dims& hidden,
                                         DataType type) noexcept {
    if (!hasRank(where, kScores, scores.nbDims, 2)) return std::nullopt;
    if (!hasRank(where, kHidden, hidden.nbDims, 3)) return std::nullopt;
    const int64_t frames = scores.d[0];
    const int64_t windows = scores.d[1];
    const int64_t patches = hidden.d[1];
    const int64_t width = hidden.d[2];
    if (!isInRange(where, "the number of frames", frames, kMaxFrames)) return std::nullopt;
    if (!isInRange(where, "the number of windows", windows, kMaxWindows)) return std::nullopt;
    if (!isInRange(where, "the number of patches", patches, kMaxWindowBytes)) return std::nullopt;
    if (!isInRange(where, "the width", width, kMaxWindowBytes)) return std::nullopt;
    if (hidden.d[0] != frames || patches % windows != 0) {
        logError(
            "%s %s: scores is (%lld, %lld) and hidden (%lld, %lld, %lld); they must be (T, W) and "
            "(T, W*G, D)",
            kSelectPackName, where, static_cast<long long>(frames), static_cast<long long>(windows),
            static_cast<long long>(hidden.d[0]), static_cast<long long>(patches),
            static_cast<long long>(width));
        return std::nullopt;
    }
    const int64_t values = patches / windows * width;
    const int64_t bytes = elementBytes(type);
    if (bytes == 0 || !isInRange(where, "the size of a window", values, kMaxWindowBytes / bytes)) {
        return std::nullopt;
    }
    SelectPackShape shape{};
    shape.frames = static_cast<int32_t>(frames);
    shape.windows = static_cast<int32_t>(windows);
    shape.window_bytes = static_cast<int32_t>(values * bytes);
    return shape;
}

bool readKept(const char* where, const Dims& kept_slot, const Dims& kept_window,
              SelectPackShape& shape) noexcept {
    if (!hasRank(where, kInputs + kKeptSlot, kept_slot.nbDims, 1)) return false;
    if (!hasRank(where, kInputs + kKeptWindow, kept_window.nbDims, 1)) return false;
    const int64_t kept = kept_slot.d[0];
    const int64_t total = int64_t{shape.frames} * shape.windows;
    if (!isInRange(where, "the number of kept windows", kept, total)) return false;
    if (kept_window.d[0] != kept) {
        logError(
            "%s %s: kept_slot has %lld values and kept_window %lld; they must have equally many",
            kSelectPackName, where, static_cast<long long>(kept),
            static_cast<long long>(kept_window.d[0]));
        return false;
    }
    shape.kept = static_cast<int32_t>(kept);
    return true;
}

bool arePresent(const char* where, const void* const* addresses, int32_t count,
                int32_t first) noexcept {
    for (int32_t i = 0; i < count; ++i) {
        if (addresses[i] == nullptr) {
            logError("%s %s: %s has no memory", kSelectPackName, where, kTensorNames[first + i]);
            return false;
        }
    }
    return true;
}

// Builds expressions; every step passes on the null of the one before.
class Expressions {
  public:
    explicit Expressions(nvinfer1::IExprBuilder& builder) noexcept : builder_(builder) {}

    const IDimensionExpr* constant(int64_t value) noexcept { return builder_.constant(value); }

    const IDimensionExpr* apply(DimensionOperation operation, const IDimensionExpr* first,
                                const IDimensionExpr* second) noexcept {
        if (first == nullptr || second == nullptr) return nullptr;
        return builder_.operation(operation, *first, *second);
    }

    // B lies in K/W..min(T, 2K/W + 1), see maxBins.
    const IDimensionExpr* binCount(const IDimensionExpr* frames, const IDimensionExpr* windows,
                                   const IDimensionExpr* kept) noexcept {
        const auto* least = apply(DimensionOperation::kCEIL_DIV, kept, windows);
        const auto* twice = apply(DimensionOperation::kPROD, constant(2), kept);
        const auto* halves = apply(DimensionOperation::kFLOOR_DIV, twice, windows);
        const auto* filled = apply(DimensionOperation::kSUM, halves, constant(1));
        const auto* most = apply(DimensionOperation::kMIN, frames, filled);
        if (least == nullptr || most == nullptr) return nullptr;
        // The one function of the builder that NVIDIA's header does not declare noexcept.
        try {
            return builder_.declareSizeTensor(kBinCount, *least, *most);
        } catch (...) {
            return nullptr;
        }
    }

  private:
    nvinfer1::IExprBuilder& builder_;
};

}  // namespace

SelectPackPlugin::SelectPackPlugin(bool refill) noexcept
    : refill_(refill ? 1 : 0),
      refill_field_(kRefillField, &refill_, nvinfer1::PluginFieldType::kINT32, 1),
      fields_{1, &refill_field_} {}

nvinfer1::IPluginCapability* SelectPackPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* SelectPackPlugin::clone() noexcept {
    auto* copy = new (std::nothrow) SelectPackPlugin(refill_ != 0);
    if (copy == nullptr) logError("%s clone: out of host memory", kSelectPackName);
    return copy;
}

nvinfer1::IPluginV3* SelectPackPlugin::attachToContext(
    nvinfer1::IPluginResourceContext* /*context*/) noexcept {
    return clone();
}

int32_t SelectPackPlugin::getNbOutputs() const noexcept { return kOutputs; }

int32_t SelectPackPlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs,
                                             const DataType* inputTypes,
                                             int32_t nbInputs) const noexcept {
    constexpr const char* kWhere = "getOutputDataTypes";
    if (!areCountsValid(kWhere, nbInputs, nbOutputs)) return kRefused;
    const DataType hidden = inputTypes[kHidden];
    for (int32_t input = 0; input < nbInputs; ++input) {
        if (!isTypeSupported(input, inputTypes[input], hidden)) {
            logError(
                "%s %s: %s has type %d; scores must be FLOAT, hidden FLOAT, HALF or BF16, "
                "kept_count INT64",
                kSelectPackName, kWhere, kTensorNames[input], static_cast<int>(inputTypes[input]));
            return kRefused;
        }
    }
    for (int32_t output = 0; output < kOutputs; ++output) {
        outputTypes[output] = output == kBins ? hidden : DataType::kINT32;
    }
    return kSuccess;
}

int32_t SelectPackPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs,
                                          const nvinfer1::DimsExprs* shapeInputs,
                                          int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs,
                                          int32_t nbOutputs,
                                          nvinfer1::IExprBuilder& exprBuilder) noexcept {
    constexpr const char* kWhere = "getOutputShapes";
    if (!areCountsValid(kWhere, nbInputs, nbOutputs)) return kRefused;
    if (nbShapeInputs != 1 || shapeInputs[0].nbDims != 1) {
        logError("%s %s: kept_count must be the only shape tensor and hold one value",
                 kSelectPackName, kWhere);
        return kRefused;
    }
    if (!hasRank(kWhere, kScores, inputs[kScores].nbDims, 2)) return kRefused;
    if (!hasRank(kWhere, kHidden, inputs[kHidden].nbDims, 3)) return kRefused;
    const IDimensionExpr* windows = inputs[kScores].d[1];
    const IDimensionExpr* kept = shapeInputs[0].d[0];
    const IDimensionExpr* bins =
        Expressions(exprBuilder).binCount(inputs[kScores].d[0], windows, kept);
    if (bins == nullptr) {
        logError("%s %s: TensorRT could not express the number of bins", kSelectPackName, kWhere);
        return kRefused;
    }
    outputs[kBins] = {3, {bins, inputs[kHidden].d[1], inputs[kHidden].d[2]}};
    outputs[kSegment] = {2, {bins, windows}};
    outputs[kKeptSlot] = {1, {kept}};
    outputs[kKeptWindow] = {1, {kept}};
    outputs[kBinCount] = {0, {}};
    return kSuccess;
}

bool SelectPackPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut,
                                                 int32_t nbInputs, int32_t nbOutputs) noexcept {
    if (!areCountsValid("supportsFormatCombination", nbInputs, nbOutputs)) return false;
    if (pos < 0 || pos >= nbInputs + nbOutputs) return false;
    const int32_t tensor = pos < nbInputs ? pos : pos - nbInputs + kInputs;
    // The descriptions after pos are not set yet, and no input depends on hidden's.
    const DataType hidden = pos < kHidden ? DataType::kFLOAT : inOut[kHidden].desc.type;
    return isSupported(tensor, inOut[pos].desc, hidden);
}

int32_t SelectPackPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs,
                                          const DynamicPluginTensorDesc* /*out*/,
                                          int32_t nbOutputs) noexcept {
    constexpr const char* kWhere = "configurePlugin";
    if (!areCountsValid(kWhere, nbInputs, nbOutputs)) return kRefused;
    return readShape(kWhere, in[kScores].max, in[kHidden].max, in[kHidden].desc.type) ? kSuccess
                                                                                      : kRefused;
}

size_t SelectPackPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                                          const DynamicPluginTensorDesc* /*outputs*/,
                                          int32_t nbOutputs) const noexcept {
    constexpr const char* kWhere = "getWorkspaceSize";
    if (!areCountsValid(kWhere, nbInputs, nbOutputs)) return 0;
    const auto shape =
        readShape(kWhere, inputs[kScores].max, inputs[kHidden].max, inputs[kHidden].desc.type);
    return shape ? selectPackWorkspaceBytes(shape->frames, shape->windows) : 0;
}

int32_t SelectPackPlugin::onShapeChange(const PluginTensorDesc* in, int32_t nbInputs,
                                        const PluginTensorDesc* /*out*/,
                                        int32_t nbOutputs) noexcept {
    constexpr const char* kWhere = "onShapeChange";
    if (!areCountsValid(kWhere, nbInputs, nbOutputs)) return kRefused;
    return readShape(kWhere, in[kScores].dims, in[kHidden].dims, in[kHidden].type) ? kSuccess
                                                                                   : kRefused;
}

int32_t SelectPackPlugin::enqueue(const PluginTensorDesc* inputDesc,
                                  const PluginTensorDesc* outputDesc, const void* const* inputs,
                                  void* const* outputs, void* workspace,
                                  cudaStream_t stream) noexcept {
    constexpr const char* kWhere = "enqueue";
    if (!areTypesValid(kWhere, inputDesc, outputDesc)) return kRefused;
    auto shape = readShape(kWhere, inputDesc[kScores].dims, inputDesc[kHidden].dims,
                           inputDesc[kHidden].type);
    if (!shape ||
        !readKept(kWhere, outputDesc[kKeptSlot].dims, outputDesc[kKeptWindow].dims, *shape)) {
        return kRefused;
    }
    shape->refill = refill_ != 0;
    if (!arePresent(kWhere, inputs, kKeptCount, kScores)) return kRefused;
    if (!arePresent(kWhere, outputs, kOutputs, kInputs)) return kRefused;
    if (workspace == nullptr) {
        logError("%s %s: there is no workspace", kSelectPackName, kWhere);
        return kRefused;
    }
    SelectPackTensors tensors{};
    tensors.scores = static_cast<const float*>(inputs[kScores]);
    tensors.hidden = inputs[kHidden];
    tensors.bins = outputs[kBins];
    tensors.segment = static_cast<int32_t*>(outputs[kSegment]);
    tensors.kept_slot = static_cast<int32_t*>(outputs[kKeptSlot]);
    tensors.kept_window = static_cast<int32_t*>(outputs[kKeptWindow]);
    tensors.bin_count = static_cast<int32_t*>(outputs[kBinCount]);
    const cudaError_t error = launchSelectPack(*shape, tensors, workspace, stream);
    if (error != cudaSuccess) {
        logError("%s %s: %s", kSelectPackName, kWhere, cudaGetErrorString(error));
    }
    return static_cast<int32_t>(error);
}

}  // namespace stts
