# cmake -D QUEST_COMPILE_SANITIZE=address,undefined (or thread): kernels that stop at the first
# error. Python has to be started with LD_PRELOAD=libasan.so (libtsan.so).
set(QUEST_COMPILE_SANITIZE "" CACHE STRING "as -fsanitize takes it")
set(quest_optimisation -O3)
if(QUEST_COMPILE_SANITIZE)
  set(quest_optimisation -O0)
  add_compile_options(-fsanitize=${QUEST_COMPILE_SANITIZE} -fno-sanitize-recover=all
                      -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${QUEST_COMPILE_SANITIZE})
  include_directories(BEFORE csrc/sanitized)
  message(STATUS "quest: with sanitizers: ${QUEST_COMPILE_SANITIZE}")
endif()
