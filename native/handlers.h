// Handlers of XLA's calls, by the names that Python registers them under.
#pragma once

#include <vector>

namespace msbp {

struct Handler {
  const char* name;
  void* function;
};

std::vector<Handler> rows_handlers();     // rows_handlers.cpp
std::vector<Handler> entries_handlers();  // entries_handlers.cpp
std::vector<Handler> weights_handlers();  // weights_handlers.cpp
std::vector<Handler> convolution_handlers();  // convolution_handlers.cpp

}  // namespace msbp
