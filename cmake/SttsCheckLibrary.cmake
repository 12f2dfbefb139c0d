# stts_check_library(target EXPORTS names...): after each link, cmake/check_library.py must find
# every requested architecture in the .so, exactly these exports, and no TensorRT or CUDA library
# that it needs. A library that fails is deleted and the build stops.

find_package(Python3 3.10 REQUIRED COMPONENTS Interpreter)

function(stts_check_library target)
    cmake_parse_arguments(_arg "" "" "EXPORTS" ${ARGN})
    list(JOIN STTS_CUBINS "," _cubins)
    list(JOIN STTS_PTX "," _ptx)
    list(JOIN _arg_EXPORTS "," _exports)
    set(_options "--cubins=${_cubins}" "--ptx=${_ptx}" "--exports=${_exports}")
    if(STTS_MAX_GLIBC)
        list(APPEND _options --max GLIBC=${STTS_MAX_GLIBC})
    endif()
    if(STTS_MAX_GLIBCXX)
        list(APPEND _options --max GLIBCXX=${STTS_MAX_GLIBCXX})
    endif()
    set(_script "${PROJECT_SOURCE_DIR}/cmake/check_library.py")
    set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${_script}")
    add_custom_command(TARGET ${target} POST_BUILD VERBATIM
        COMMAND "${Python3_EXECUTABLE}" "${_script}" --delete-on-failure ${_options}
                "$<TARGET_FILE:${target}>")
endfunction()
