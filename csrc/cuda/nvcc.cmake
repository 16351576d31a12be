# What a CUDA compiler can do for us.

# Why this one cannot be used; empty if it can.
function(refusal_of nvcc out)
  if(NOT nvcc)
    set(${out} "no nvcc was found that works with this C++ compiler (put one on PATH or set CUDACXX)" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE said ERROR_QUIET)
  string(REGEX REPLACE ".*release ([0-9.]+).*" "\\1" release "${said}")
  if(release MATCHES "^[0-9.]+$" AND release VERSION_LESS 12.1)
    set(${out} "${nvcc} is of CUDA ${release}, and 12.1 is the first with kernel parameters of more than 4 KB"
        PARENT_SCOPE)
  else()
    set(${out} "" PARENT_SCOPE)
  endif()
endfunction()

# The compute capabilities that kernels are built for unless FUSEDCLIP_CUDA_ARCHS says which.
set(FUSEDCLIP_ARCHITECTURES 80 90 100 120)

# Those of them that this nvcc knows: before CUDA 12.8 it refuses 100 and 120, and one refused is a failed build.
function(architectures_known_to nvcc out)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE listed RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "fusedclip: '${nvcc} --list-gpu-arch' failed (${status}); FUSEDCLIP_CUDA_ARCHS chooses the "
                        "compute capabilities without it, FUSEDCLIP_CUDA=0 builds for the CPU alone")
  endif()
  string(REGEX MATCHALL "[0-9]+" known "${listed}")
  set(chosen)
  set(left_out)
  foreach(architecture IN LISTS FUSEDCLIP_ARCHITECTURES)
    if(architecture IN_LIST known)
      list(APPEND chosen ${architecture})
    else()
      list(APPEND left_out ${architecture})
    endif()
  endforeach()
  if(NOT chosen)
    message(FATAL_ERROR "fusedclip: ${nvcc} knows none of the compute capabilities ${FUSEDCLIP_ARCHITECTURES}")
  endif()
  if(left_out)
    list(JOIN left_out ", " names)
    message(WARNING "fusedclip: ${nvcc} does not know compute capability ${names}: there will be no machine code for "
                    "such GPUs, for which a newer CUDA is needed (12.8 for 100 and 120)")
  endif()
  set(${out} ${chosen} PARENT_SCOPE)
endfunction()
