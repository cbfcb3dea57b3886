// Handlers of XLA's calls, by the names that Python registers them under.
#pragma once

#include <vector>

namespace msbp {

struct Handler {
  const char* name;
  void* function;
};

// Each in the file of its name.
std::vector<Handler> rows_handlers();
std::vector<Handler> entries_handlers();
std::vector<Handler> weights_handlers();
std::vector<Handler> unpack_handlers();
std::vector<Handler> convolution_handlers();
std::vector<Handler> images_handlers();

}  // namespace msbp
