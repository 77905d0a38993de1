# The CUDA kernels as a module of their own, where KDDP_CUDA wants them: AUTO where a CUDA compiler is found, ON always
# (an error where there is none), OFF never.
if(NOT KDDP_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KDDP_CUDA: expected AUTO, ON or OFF, got ${KDDP_CUDA}")
endif()
if(KDDP_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(KDDP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KDDP_CUDA=ON: no CUDA compiler was found; set CUDACXX, or build with KDDP_CUDA=OFF")
  endif()
  message(STATUS "KDDP_CUDA=AUTO: no CUDA compiler was found, so the CUDA kernels are left out")
  return()
endif()

# `native` where a GPU is visible; else machine code of each generation, and PTX that newer ones can translate. Three
# compilations serve the seven of them, for nothing in the kernels asks for the features of one.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
  elseif(EXISTS /dev/nvidia0)
    set(CMAKE_CUDA_ARCHITECTURES native)
  else()
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    set(architectures 75-real 80-real 86-real 89-real 90-real 100-real 120-real 100-virtual)
    set(generate_code "SHELL:-gencode arch=compute_75,code=sm_75"
                      "SHELL:-gencode arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90]"
                      "SHELL:-gencode arch=compute_100,code=[sm_100,sm_120,compute_100]")
  endif()
endif()
if(CMAKE_CUDA_ARCHITECTURES)
  set(architectures ${CMAKE_CUDA_ARCHITECTURES})
endif()
string(REPLACE ";" " " architectures "${architectures}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "KDDP_CUDA=${KDDP_CUDA}: the CUDA kernels are built for ${architectures}")

# Apart from what includes pybind11, whose path is another in each of pip's build environments.
add_library(kernels_cuda OBJECT
  csrc/cuda/kd_l1_loss.cu csrc/cuda/kd_l1_loss_float32.cu csrc/cuda/kd_l1_loss_bfloat16.cu
  csrc/cuda/kd_l1_loss_float16.cu csrc/cuda/kd_l1_loss_float64.cu
  csrc/cuda/scale.cu csrc/cuda/compaction.cu csrc/cuda/occupancy.cu)
set(host_flags -Wall -Wextra)
if(KDDP_WARNINGS_AS_ERRORS)
  list(APPEND host_flags -Werror)
  target_compile_options(kernels_cuda PRIVATE -Werror=all-warnings)
endif()
list(JOIN host_flags "," host_flags)
# 128: a loop that cannot be reached, behind the return of an `if constexpr`.
# --threads: two architectures of a file at once, or the last file would have one core while the others rest.
target_compile_options(kernels_cuda PRIVATE ${generate_code} --expt-relaxed-constexpr -diag-suppress=128 --threads=2
                       -Xcompiler=${host_flags},-fvisibility=hidden)

pybind11_add_module(_cuda NO_EXTRAS python_bindings/cuda.cpp)
target_link_libraries(_cuda PRIVATE kernels_cuda CUDA::cudart_static)
target_compile_definitions(_cuda PRIVATE
  KDDP_CUDA_COMPILER="${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}"
  KDDP_CUDA_ARCHITECTURES="${architectures}")
install(TARGETS _cuda LIBRARY DESTINATION kddp_ext)
