# O CMakeLists.txt do llama-cpp-python liga esta opção no cache; a variável comum, de mesmo nome, vale mais.
set(LLAMA_BUILD_COMMON OFF)
