#include "select_pack/select_pack_creator.h"

#include <cstring>
#include <new>

#include "plugin_log.h"

namespace stts {
namespace {

bool readRefill(const nvinfer1::PluginField& field, bool& refill) noexcept {
    if (field.name == nullptr || std::strcmp(field.name, kRefillField) != 0) {
        logError("%s: unknown attribute '%s'; the only attribute is '%s'", kSelectPackName,
                 field.name == nullptr ? "" : field.name, kRefillField);
        return false;
    }
    if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 ||
        field.data == nullptr) {
        logError("%s: attribute '%s' has type %d and length %d; it must be one INT32",
                 kSelectPackName, kRefillField, static_cast<int>(field.type), field.length);
        return false;
    }
    int32_t value = 0;
    std::memcpy(&value, field.data, sizeof value);
    if (value != 0 && value != 1) {
        logError("%s: attribute '%s' is %d; it must be 0 or 1", kSelectPackName, kRefillField,
                 value);
        return false;
    }
    refill = value == 1;
    return true;
}

}  // namespace

nvinfer1::IPluginV3* SelectPackCreator::createPlugin(const char* /*name*/,
                                                     const nvinfer1::PluginFieldCollection* fields,
                                                     nvinfer1::TensorRTPhase /*phase*/) noexcept {
    if (fields == nullptr || fields->nbFields < 0 ||
        (fields->nbFields > 0 && fields->fields == nullptr)) {
        logError("%s: no collection of attributes; pass one, an empty one for the defaults",
                 kSelectPackName);
        return nullptr;
    }
    bool refill = true;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        if (!readRefill(fields->fields[i], refill)) return nullptr;
    }
    auto* plugin = new (std::nothrow) SelectPackPlugin(refill);
    if (plugin == nullptr) logError("%s: out of host memory", kSelectPackName);
    return plugin;
}

}  // namespace stts
