#include "../emulator.h"
