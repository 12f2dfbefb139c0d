// Our declarations of TensorRT's interface beside the real ones: same sizes, offsets and values.
// Built only where there are real headers; compiling it is the test.
#include <NvInferRuntime.h>

#define nvinfer1 stts_interface
#include "interface/NvInferPluginInterface.h"
#undef nvinfer1

namespace {

namespace real = nvinfer1;
namespace own = stts_interface;

#define SAME_SIZE(type) static_assert(sizeof(own::type) == sizeof(real::type))
#define SAME_OFFSET(type, member) \
    static_assert(offsetof(own::type, member) == offsetof(real::type, member))
#define SAME_VALUE(name) \
    static_assert(static_cast<int64_t>(own::name) == static_cast<int64_t>(real::name))

SAME_SIZE(Dims);
SAME_OFFSET(Dims, nbDims);
SAME_OFFSET(Dims, d);
SAME_VALUE(Dims::MAX_DIMS);
SAME_SIZE(PluginTensorDesc);
SAME_OFFSET(PluginTensorDesc, dims);
SAME_OFFSET(PluginTensorDesc, type);
SAME_OFFSET(PluginTensorDesc, format);
SAME_OFFSET(PluginTensorDesc, scale);
SAME_SIZE(DynamicPluginTensorDesc);
SAME_OFFSET(DynamicPluginTensorDesc, desc);
SAME_OFFSET(DynamicPluginTensorDesc, min);
SAME_OFFSET(DynamicPluginTensorDesc, max);
SAME_OFFSET(DynamicPluginTensorDesc, opt);
SAME_SIZE(PluginField);
SAME_OFFSET(PluginField, name);
SAME_OFFSET(PluginField, data);
SAME_OFFSET(PluginField, type);
SAME_OFFSET(PluginField, length);
SAME_SIZE(PluginFieldCollection);
SAME_OFFSET(PluginFieldCollection, nbFields);
SAME_OFFSET(PluginFieldCollection, fields);
SAME_SIZE(InterfaceInfo);
SAME_OFFSET(InterfaceInfo, kind);
SAME_OFFSET(InterfaceInfo, major);
SAME_OFFSET(InterfaceInfo, minor);
SAME_SIZE(DimsExprs);
SAME_OFFSET(DimsExprs, nbDims);
SAME_OFFSET(DimsExprs, d);
SAME_SIZE(IDimensionExpr);
SAME_SIZE(IExprBuilder);
SAME_SIZE(IVersionedInterface);
SAME_SIZE(IPluginV3);
SAME_SIZE(IPluginV3OneCore);
SAME_SIZE(IPluginV3OneBuild);
SAME_SIZE(IPluginV3OneRuntime);
SAME_SIZE(IPluginCreatorV3One);
SAME_SIZE(IPluginCreatorInterface);

SAME_VALUE(DataType::kFLOAT);
SAME_VALUE(DataType::kHALF);
SAME_VALUE(DataType::kINT8);
SAME_VALUE(DataType::kINT32);
SAME_VALUE(DataType::kBOOL);
SAME_VALUE(DataType::kUINT8);
SAME_VALUE(DataType::kFP8);
SAME_VALUE(DataType::kBF16);
SAME_VALUE(DataType::kINT64);
SAME_VALUE(TensorFormat::kLINEAR);
SAME_VALUE(TensorFormat::kCHW2);
SAME_VALUE(DimensionOperation::kSUM);
SAME_VALUE(DimensionOperation::kPROD);
SAME_VALUE(DimensionOperation::kMAX);
SAME_VALUE(DimensionOperation::kMIN);
SAME_VALUE(DimensionOperation::kSUB);
SAME_VALUE(DimensionOperation::kEQUAL);
SAME_VALUE(DimensionOperation::kLESS);
SAME_VALUE(DimensionOperation::kFLOOR_DIV);
SAME_VALUE(DimensionOperation::kCEIL_DIV);
SAME_VALUE(PluginFieldType::kFLOAT32);
SAME_VALUE(PluginFieldType::kINT32);
SAME_VALUE(PluginFieldType::kUNKNOWN);
SAME_VALUE(PluginFieldType::kINT64);
SAME_VALUE(TensorRTPhase::kBUILD);
SAME_VALUE(TensorRTPhase::kRUNTIME);
SAME_VALUE(PluginCapabilityType::kCORE);
SAME_VALUE(PluginCapabilityType::kBUILD);
SAME_VALUE(PluginCapabilityType::kRUNTIME);
SAME_VALUE(APILanguage::kCPP);
SAME_VALUE(APILanguage::kPYTHON);
SAME_VALUE(IPluginV3OneBuild::kDEFAULT_FORMAT_COMBINATION_LIMIT);

static_assert(sizeof(own::DataType) == 4 && sizeof(real::DataType) == 4);
static_assert(sizeof(own::TensorFormat) == 4 && sizeof(real::TensorFormat) == 4);

}  // namespace

int main() {}
