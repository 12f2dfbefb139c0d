# Says at the end of configuring what will be built, and from what.

function(stts_summary name value)
    string(LENGTH "${name}" _length)
    math(EXPR _missing "34 - ${_length}")
    string(REPEAT " " ${_missing} _spaces)
    message(STATUS "  ${name}${_spaces}${value}")
endfunction()

message(STATUS "stts_plugins ${STTS_VERSION}, ${CMAKE_BUILD_TYPE}, ${CMAKE_SYSTEM_PROCESSOR}")
foreach(_option STTS_BUILD_PLUGIN STTS_BUILD_TESTS STTS_BUILD_DEVICE_PROGRAM STTS_WARNINGS_AS_ERRORS
                STTS_REQUIRE_TENSORRT_HEADERS)
    stts_summary(${_option} "${${_option}}")
endforeach()
if(CMAKE_CUDA_COMPILER_VERSION)
    stts_summary("nvcc" "${CMAKE_CUDA_COMPILER} (${CMAKE_CUDA_COMPILER_VERSION})")
    stts_summary("CMAKE_CUDA_ARCHITECTURES" "${CMAKE_CUDA_ARCHITECTURES}")
endif()
if(STTS_MAX_GLIBC OR STTS_MAX_GLIBCXX)
    stts_summary("STTS_MAX_GLIBC, _GLIBCXX" "${STTS_MAX_GLIBC}, ${STTS_MAX_GLIBCXX}")
endif()
stts_summary("TensorRT headers" "${STTS_TENSORRT_CHOICE}")
