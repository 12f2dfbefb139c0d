# Before enable_language(CUDA): finds nvcc and chooses the architectures.
# Sets CMAKE_CUDA_COMPILER, CMAKE_CUDA_ARCHITECTURES, STTS_CUBINS and STTS_PTX (numbers), and
# STTS_CUDA_INCLUDES, where C++ files find CUDA's headers in a cross build.

# Orin is 87, Hopper 90, Thor 110.
set(STTS_ARCHITECTURES 80 86 87 89 90 100 110 120)

function(stts_find_nvcc)
    if(CMAKE_CUDA_COMPILER OR NOT "$ENV{CUDACXX}" STREQUAL "")
        return()  # CMake's own rules
    endif()
    file(GLOB _wheels
         "$ENV{VIRTUAL_ENV}/lib/python3*/site-packages/nvidia/cu1[3-9]/bin"
         "${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu1[3-9]/bin")
    find_program(STTS_NVCC nvcc NO_CACHE NO_CMAKE_FIND_ROOT_PATH)
    if(NOT STTS_NVCC)
        find_program(STTS_NVCC nvcc
                     PATHS "$ENV{CUDA_PATH}/bin" "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin
                           /opt/cuda/bin ${_wheels}
                     NO_CACHE NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
    endif()
    if(NOT STTS_NVCC)
        message(FATAL_ERROR
            "nvcc not found: looked at CUDACXX, PATH, CUDA_PATH, CUDA_HOME, /usr/local/cuda and the virtual "
            "environment ($VIRTUAL_ENV or .venv).\n"
            "Fix: install CUDA 12.6 or newer, or pip install -e '.[plugin]' in a virtual "
            "environment, or configure the host tests alone: cmake --preset tests")
    endif()
    set(CMAKE_CUDA_COMPILER "${STTS_NVCC}" CACHE FILEPATH "CUDA compiler")
endfunction()

# The program that CMake will take as the CUDA compiler.
function(stts_nvcc result)
    if(CMAKE_CUDA_COMPILER)
        set(_nvcc "${CMAKE_CUDA_COMPILER}")
    else()
        set(_nvcc "$ENV{CUDACXX}")
    endif()
    if(NOT IS_ABSOLUTE "${_nvcc}")
        find_program(_path "${_nvcc}" NO_CACHE NO_CMAKE_FIND_ROOT_PATH)
        if(_path)
            set(_nvcc "${_path}")
        endif()
    endif()
    set(${result} "${_nvcc}" PARENT_SCOPE)
endfunction()

function(stts_run_nvcc nvcc result)
    execute_process(COMMAND "${nvcc}" ${ARGN} OUTPUT_VARIABLE _out ERROR_VARIABLE _err
                    RESULT_VARIABLE _status)
    if(NOT _status EQUAL 0)
        message(FATAL_ERROR "'${nvcc} ${ARGN}' failed (${_status}): ${_out}${_err}")
    endif()
    set(${result} "${_out}" PARENT_SCOPE)
    set(STTS_NVCC_ERROR "${_err}" PARENT_SCOPE)
endfunction()

function(stts_check_nvcc_version nvcc)
    stts_run_nvcc("${nvcc}" _text --version)
    if(NOT _text MATCHES "release ([0-9]+\\.[0-9]+)")
        message(FATAL_ERROR "${nvcc} is no nvcc: it answers --version with\n${_text}")
    endif()
    set(STTS_NVCC_VERSION "${CMAKE_MATCH_1}" PARENT_SCOPE)
    if(CMAKE_MATCH_1 VERSION_LESS 12.6)
        message(FATAL_ERROR "${nvcc} is version ${CMAKE_MATCH_1}; 12.6 or newer is needed")
    endif()
endfunction()

# A cubin for each architecture that this nvcc knows, and PTX of the highest for later GPUs.
function(stts_default_architectures nvcc)
    stts_run_nvcc("${nvcc}" _known --list-gpu-code)
    string(REGEX MATCHALL "sm_[0-9]+" _known "${_known}")
    set(_chosen "")
    set(_left_out "")
    foreach(_arch IN LISTS STTS_ARCHITECTURES)
        if("sm_${_arch}" IN_LIST _known)
            list(APPEND _chosen "${_arch}")
        else()
            list(APPEND _left_out "sm_${_arch}")
        endif()
    endforeach()
    if(_chosen STREQUAL "")
        message(FATAL_ERROR "${nvcc} knows none of ${STTS_ARCHITECTURES}")
    endif()
    if(_left_out)
        list(JOIN _left_out ", " _names)
        message(STATUS "Architectures left out: ${_names} (nvcc ${STTS_NVCC_VERSION} does not know "
                       "them; 100 and 120 need nvcc 12.8, 110 needs 13.0)")
    endif()
    list(GET _chosen -1 _highest)
    list(TRANSFORM _chosen APPEND "-real")
    list(APPEND _chosen "${_highest}-virtual")
    set(CMAKE_CUDA_ARCHITECTURES "${_chosen}" PARENT_SCOPE)
endfunction()

# What the .so must hold for a value of CMAKE_CUDA_ARCHITECTURES; "90" is a cubin and PTX.
function(stts_expected_code)
    set(_cubins "")
    set(_ptx "")
    foreach(_arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
        if(NOT _arch MATCHES "^([0-9]+)[af]?(-real|-virtual)?$")
            message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES: '${_arch}' is no architecture number "
                                "such as 87, 87-real or 120-virtual")
        endif()
        if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
            list(APPEND _cubins "${CMAKE_MATCH_1}")
        endif()
        if(NOT CMAKE_MATCH_2 STREQUAL "-real")
            list(APPEND _ptx "${CMAKE_MATCH_1}")
        endif()
    endforeach()
    set(STTS_CUBINS "${_cubins}" PARENT_SCOPE)
    set(STTS_PTX "${_ptx}" PARENT_SCOPE)
endfunction()

# Folder that holds bin/nvcc, or "" for a wrapper or a distribution's layout.
function(stts_toolkit_root nvcc result)
    get_filename_component(_real "${nvcc}" REALPATH)
    get_filename_component(_bin "${_real}" DIRECTORY)
    get_filename_component(_root "${_bin}" DIRECTORY)
    if(NOT EXISTS "${_root}/include/cuda_runtime.h")
        stts_run_nvcc("${nvcc}" _ignored --dryrun -x cu -c /dev/null)
        if(STTS_NVCC_ERROR MATCHES "#\\$ TOP=([^\n]+)\n")
            get_filename_component(_root "${CMAKE_MATCH_1}" REALPATH)
        else()
            set(_root "")
        endif()
    endif()
    set(${result} "${_root}" PARENT_SCOPE)
endfunction()

# The target's headers and libcudart_static.a: a cross toolkit's folder beside nvcc, or the user's.
function(stts_cuda_target_root toolkit result)
    set(_places "${STTS_CUDA_TARGET_ROOT}")
    if(NOT STTS_CUDA_TARGET_ROOT)
        set(_places "${toolkit}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux")
        if(CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
            list(APPEND _places "${toolkit}/targets/sbsa-linux")
        endif()
    endif()
    foreach(_place IN LISTS _places)
        if(EXISTS "${_place}/lib/libcudart_static.a" AND EXISTS "${_place}/include/cuda_runtime.h")
            set(${result} "${_place}" PARENT_SCOPE)
            return()
        endif()
    endforeach()
    list(JOIN _places ", " _places)
    message(FATAL_ERROR
        "A cross build needs CUDA's headers and runtime for ${CMAKE_SYSTEM_PROCESSOR}: no "
        "lib/libcudart_static.a and include/cuda_runtime.h in ${_places}\n"
        "Fix: -DSTTS_CUDA_TARGET_ROOT=FOLDER that has them (trt_plugins/BUILDING.md: a 2 MB wheel)")
endfunction()

# nvcc looks for libcudart_static.a in lib64, but the PyPI wheels have lib; in a cross build it looks
# in targets/aarch64-linux for all. CMake's compiler test links, so this precedes enable_language.
function(stts_nvcc_flags nvcc result includes)
    stts_toolkit_root("${nvcc}" _toolkit)
    set(_flags "")
    set(_includes "")
    if(CMAKE_CROSSCOMPILING)
        stts_cuda_target_root("${_toolkit}" _target)
        set(_includes "${_target}/include" "${_toolkit}/include")  # crt/ may only be in the second
        foreach(_folder IN LISTS _includes)
            string(APPEND _flags " -isystem \"${_folder}\"")
        endforeach()
        string(APPEND _flags " -L\"${_target}/lib\"")
    elseif(EXISTS "${_toolkit}/lib/libcudart_static.a")
        string(APPEND _flags " -L\"${_toolkit}/lib\"")
    endif()
    set(${result} "${_flags}" PARENT_SCOPE)
    set(${includes} "${_includes}" PARENT_SCOPE)
endfunction()

stts_find_nvcc()
stts_nvcc(_stts_nvcc)
stts_check_nvcc_version("${_stts_nvcc}")
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
elseif(NOT CMAKE_CUDA_ARCHITECTURES)
    stts_default_architectures("${_stts_nvcc}")
endif()
stts_expected_code()
stts_nvcc_flags("${_stts_nvcc}" _flags STTS_CUDA_INCLUDES)
string(APPEND CMAKE_CUDA_FLAGS_INIT "${_flags}")
