#!/bin/sh
# Build llama.cpp in the folder $1, from the source distribution of llama-cpp-python, with the tools of the environment $2.
set -eu
release=llama_cpp_python-0.3.36
tools=$(cd "$2/bin" && pwd)
mkdir -p "$1"
cd "$1"
[ -e lib/libllama.so ] && exit 0
"$tools/pip" download --quiet --no-deps --no-binary llama-cpp-python "llama-cpp-python==${release#*-}"
tar xzf "$release.tar.gz"
ln -sfn "$release/vendor/llama.cpp" src
ln -sfn "$release/llama_cpp" llama_cpp
echo "of llama-cpp-python ${release#*-}" > VERSION
PATH="$tools:$PATH"
export PATH
cmake -S src -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_COMMON=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama
ln -sfn build/bin lib
