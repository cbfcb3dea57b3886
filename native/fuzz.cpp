// Every kernel on random shapes against loops that are plainly right, on real threads and in blocks of the exact size.
//
// It needs neither Python nor XLA, so that it runs whole under the sanitizers and on other processors:
//   c++ -std=c++17 -O1 -g -fsanitize=address,undefined fuzz.cpp scratch.cpp kernels.cpp -o fuzz -pthread && ./fuzz 300
#include "fuzz_columns.h"
#include "fuzz_convolution.h"
#include "fuzz_matrices.h"
#include "fuzz_weights.h"

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  for (const msbp::Kernels* const* kernels = msbp::available(); *kernels != nullptr; ++kernels) {
    for (int i = 0; i < rounds; ++i) {
      Threads pool(1 + i % 4);
      columns_once(**kernels, pool);
      rows_once(**kernels, pool);
      entries_once(**kernels, pool);
      dither_once(**kernels, pool);
      weights_once(**kernels, pool);
      convolutions_once(**kernels, pool);
      images_once(**kernels, pool);
    }
    std::printf("%s: %d rounds\n", (*kernels)->name, rounds);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
