# stts_compile_options: what every target of this project compiles with.

add_library(stts_compile_options INTERFACE)
target_compile_options(stts_compile_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wconversion>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(STTS_WARNINGS_AS_ERRORS)
    target_compile_options(stts_compile_options INTERFACE
        $<$<COMPILE_LANGUAGE:CXX>:-Werror>
        $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings -Xcompiler=-Werror>)
endif()
