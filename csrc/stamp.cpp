#include "stamp.h"

namespace gradclust {

const char* const stamp = GRADCLUST_STAMP;

}  // namespace gradclust
