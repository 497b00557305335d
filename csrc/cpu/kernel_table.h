// The kernels of one instruction set, as a table. Included last by isa_*.cpp.
#pragma once

#include "attention.h"
#include "block_mass.h"
#include "pool.h"
#include "probe.h"
#include "score.h"
#include "skip.h"
#include "skip_mask.h"
#include "tile_max.h"

#define BSFA_STRING(x) #x
#define BSFA_NAME(x) BSFA_STRING(x)

namespace bsfa::cpu::BSFA_ISA {
namespace {

constexpr Kernels kTable = {
    BSFA_NAME(BSFA_ISA), pool_scratch,     pool_block,    score_scratch,     score_tile,     attention_scratch,
    attention_tile,      skip_scratch,     skip_tile,     skip_mask_scratch, skip_mask_tile, block_mass_scratch,
    block_mass_tile,     tile_max_scratch, tile_max_tile, probe_scratch,     probe_maxima,   probe_spread,
};

}  // namespace
}  // namespace bsfa::cpu::BSFA_ISA
