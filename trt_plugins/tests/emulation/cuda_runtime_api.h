// The CUDA runtime that the plugin needs, on the CPU: types and errors. Stands in for NVIDIA's
// header of this name in the CPU builds of the tests.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};

const char* cudaGetErrorString(cudaError_t error);
