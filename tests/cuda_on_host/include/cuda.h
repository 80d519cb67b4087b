#include "../tensor_maps.h"
