// Makes SttsSelectPack plugins from their attributes.
#pragma once

#include "select_pack/select_pack_plugin.h"
#include "tensorrt.h"

namespace stts {

class SelectPackCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    // Returns null, and logs why, for an attribute that is unknown or has no valid value.
    nvinfer1::IPluginV3* createPlugin(const char* name,
                                      const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
    const char* getPluginName() const noexcept override { return kSelectPackName; }
    const char* getPluginVersion() const noexcept override { return kSelectPackVersion; }
    const char* getPluginNamespace() const noexcept override { return kSelectPackNamespace; }

  private:
    nvinfer1::PluginField refill_field_{kRefillField, nullptr, nvinfer1::PluginFieldType::kINT32,
                                        1};
    nvinfer1::PluginFieldCollection fields_{1, &refill_field_};
};

}  // namespace stts
