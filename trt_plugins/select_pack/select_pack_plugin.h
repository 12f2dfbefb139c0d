// SttsSelectPack as TensorRT sees it: which tensors it takes and gives, and when it refuses.
// The equation, the shapes and the limits are in trt_plugins/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensorrt.h"

namespace stts {

constexpr const char* kSelectPackName = "SttsSelectPack";
constexpr const char* kSelectPackVersion = "1";
constexpr const char* kSelectPackNamespace = "stts";
constexpr const char* kRefillField = "refill";

// Stateless but for its attribute, so clones are independent and every context can have its own.
// Functions that return a status return 0 for success; otherwise the reason has been logged.
class SelectPackPlugin final : public nvinfer1::IPluginV3,
                               public nvinfer1::IPluginV3OneCore,
                               public nvinfer1::IPluginV3OneBuild,
                               public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit SelectPackPlugin(bool refill) noexcept;

    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return kSelectPackName; }
    const char* getPluginVersion() const noexcept override { return kSelectPackVersion; }
    const char* getPluginNamespace() const noexcept override { return kSelectPackNamespace; }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                               const nvinfer1::DataType* inputTypes,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t nbInputs,
                            const nvinfer1::DimsExprs* shapeInputs, int32_t nbShapeInputs,
                            nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* inOut,
                                   int32_t nbInputs, int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t nbInputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t nbOutputs) const noexcept override;
    const char* getTimingCacheID() noexcept override { return description(); }
    const char* getMetadataString() noexcept override { return description(); }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t nbInputs,
                          const nvinfer1::PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDesc,
                    const nvinfer1::PluginTensorDesc* outputDesc, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        return &fields_;
    }

  private:
    const char* description() const noexcept { return refill_ != 0 ? "refill=1" : "refill=0"; }

    int32_t refill_;
    nvinfer1::PluginField refill_field_;
    nvinfer1::PluginFieldCollection fields_;
};

}  // namespace stts
