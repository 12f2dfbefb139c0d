# Debian's and Ubuntu's cross compiler (apt install g++-aarch64-linux-gnu), for Jetson and Grace.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)

find_program(STTS_QEMU NAMES qemu-aarch64 qemu-aarch64-static NO_CMAKE_FIND_ROOT_PATH)
if(STTS_QEMU)
    set(CMAKE_CROSSCOMPILING_EMULATOR "${STTS_QEMU};-L;/usr/aarch64-linux-gnu")
endif()
