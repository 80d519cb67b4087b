// What this module was built from: a digest of all files in csrc, made by CMakeLists.txt.
#pragma once

namespace gradclust {

extern const char* const stamp;

}  // namespace gradclust
