// TensorRT's plugin interface: NVIDIA's header where it is installed, else our own declarations of
// the same. -DSTTS_OWN_TENSORRT_INTERFACE takes our own in any case.
#pragma once

#if !defined(STTS_OWN_TENSORRT_INTERFACE) && __has_include(<NvInferRuntime.h>)
#include <NvInferRuntime.h>
static_assert(NV_TENSORRT_VERSION >= 100300, "SttsSelectPack needs TensorRT 10.3 or newer");
#else
#include "interface/NvInferPluginInterface.h"
#endif

// One library serves every TensorRT from 10.3 on, because these never changed.
static_assert(sizeof(nvinfer1::Dims) == 72);
static_assert(sizeof(nvinfer1::PluginTensorDesc) == 88);
static_assert(sizeof(nvinfer1::DynamicPluginTensorDesc) == 88 + 3 * 72);
static_assert(sizeof(nvinfer1::DimsExprs) == 72);
static_assert(sizeof(nvinfer1::PluginField) == 24);
static_assert(sizeof(nvinfer1::PluginFieldCollection) == 16);
static_assert(sizeof(nvinfer1::InterfaceInfo) == 16);
static_assert(static_cast<int32_t>(nvinfer1::DataType::kBF16) == 7);
static_assert(static_cast<int32_t>(nvinfer1::DataType::kINT64) == 8);
static_assert(static_cast<int32_t>(nvinfer1::DimensionOperation::kCEIL_DIV) == 8);
static_assert(static_cast<int32_t>(nvinfer1::PluginFieldType::kINT32) == 5);
