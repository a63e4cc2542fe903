# Every file of csrc/cpu/kernels is compiled once per instruction-set level, each time with
# QUEST_ISA, the C++ namespace of that copy, set to the level's name. csrc/cpu/dispatch.cpp learns
# from QUEST_HAVE_<LEVEL> which copies there are, and picks one at run time.
include(CheckCXXCompilerFlag)
file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cpu/kernels/*.cpp)

# Rows of sketches are the same bits on every machine: no product is added before it is rounded.
# Both pass vectors of 8 floats to functions, all of them inlined.
set_source_files_properties(csrc/cpu/kernels/sketch_rows.cpp PROPERTIES
                            COMPILE_OPTIONS "-ffp-contract=off;-Wno-psabi")
set_source_files_properties(csrc/cpu/kernels/sketch_scores.cpp PROPERTIES
                            COMPILE_OPTIONS "-Wno-psabi")

function(quest_add_level level) # ARGN: compiler flags
  if(NOT kernel_sources)
    return()
  endif()
  string(TOUPPER ${level} upper)
  if(ARGN)
    string(REPLACE ";" " " flags "${ARGN}")
    check_cxx_compiler_flag("${flags}" QUEST_COMPILER_HAS_${upper})
    if(NOT QUEST_COMPILER_HAS_${upper})
      message(WARNING "quest: the compiler does not know ${flags}: no ${level} kernels")
      return()
    endif()
  endif()
  add_library(quest_${level} OBJECT ${kernel_sources})
  target_include_directories(quest_${level} PRIVATE csrc)
  target_compile_definitions(quest_${level} PRIVATE QUEST_ISA=${level})
  # Not -ffast-math: the kernels rely on infinities and NaN.
  target_compile_options(quest_${level} PRIVATE -Wall -Wextra ${quest_optimisation} -fno-math-errno
                         -fno-trapping-math -ffp-contract=fast ${ARGN})
  target_sources(quest PRIVATE $<TARGET_OBJECTS:quest_${level}>)
  target_compile_definitions(quest PRIVATE QUEST_HAVE_${upper})
  message(STATUS "quest: ${level} kernels")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  quest_add_level(scalar -march=x86-64)
  quest_add_level(avx2 -march=x86-64-v3)
  quest_add_level(avx512 -march=x86-64-v4)
  quest_add_level(avx512_bf16 -march=x86-64-v4 -mavx512bf16 -mavx512vnni)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  quest_add_level(scalar)
  quest_add_level(neon)
else()
  quest_add_level(scalar)
endif()
