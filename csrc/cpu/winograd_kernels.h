// Winograd's convolution of one block of squares by one block of panels. Included by conv_kernels.h, per instruction
// set.

namespace fusedres::cpu::FUSEDRES_ISA {

// One square of outputs: its image, and the first row and column.
struct Square {
  int64_t image, row, col;

  static Square of(const WinogradGrid& grid, int64_t index) {
    const int64_t across = grid.w.squares(), in_image = index % grid.squares();
    return {index / grid.squares(), grid.h.start(in_image / across), grid.w.start(in_image % across)};
  }
};

// Four inputs of one axis as B^T of them.
template <typename V>
FUSEDRES_INLINE void winograd_input(V a, V b, V c, V d, V (&out)[4]) {
  out[0] = a - c;
  out[1] = b + c;
  out[2] = c - b;
  out[3] = b - d;
}

// Four products of one axis as its two outputs, A^T of them.
template <typename V>
FUSEDRES_INLINE void winograd_output(V a, V b, V c, V d, V (&out)[2]) {
  out[0] = a + b + c;
  out[1] = b - c - d;
}

// The inputs of a square, those outside from `zeros`.
template <typename T>
void winograd_inputs(const ConvPlan& plan, const T* x, const Square& square, const T* zeros, const T* (&inputs)[4][4]) {
  const ConvSizes& sizes = plan.sizes;
  const WinogradAxis &h = plan.winograd->h, &w = plan.winograd->w;
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t row = square.row + h.offset + i * h.step;
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t col = square.col + w.offset + j * w.step;
      const bool is_inside = is_within(row, sizes.in_h) && is_within(col, sizes.in_w);
      const int64_t pixel = (square.image * sizes.in_h + row) * sizes.in_w + col;
      inputs[i][j] = is_inside ? x + pixel * sizes.in_pixel : zeros;
    }
  }
}

// B^T d B of the block's squares: table.squares (kFrequencies, squares, depth).
template <typename T>
void winograd_transform(const ConvPlan& plan, const ConvOperands<T>& operands, Range squares, ConvTable<T>& table) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t depth = plan.sizes.depth;
  // An odd number of lines: the sixteen stores of one vector meet sixteen sets of the cache.
  table.square_step = (ceil_div(squares.size() * depth, kLine) | 1) * kLine;
  table.squares.resize(kFrequencies * table.square_step);
  table.zeros.resize(depth);
  for (int64_t index = squares.begin; index < squares.end; ++index) {
    const T* inputs[4][4];
    winograd_inputs(plan, operands.x, Square::of(*plan.winograd, index), table.zeros.data(), inputs);
    T* const to = table.squares.data() + (index - squares.begin) * depth;
    for_each_vector<T>(depth, [&](auto lanes, int64_t c) {
      Vec<T> columns[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        winograd_input(lanes.load(inputs[0][j] + c), lanes.load(inputs[1][j] + c), lanes.load(inputs[2][j] + c),
                       lanes.load(inputs[3][j] + c), columns[j]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Vec<T> row[4];
        winograd_input(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) lanes.store(to + (4 * i + j) * table.square_step + c, row[j]);
      }
    });
  }
}

// Where the outputs of the block's squares go, four each: table.outputs, -1 for one that is outside, and
// table.residual.
template <typename T>
void winograd_outputs(const ConvPlan& plan, const ConvOperands<T>& operands, Range squares, ConvTable<T>& table) {
  const ConvSizes& sizes = plan.sizes;
  table.outputs.assign(4 * squares.size(), -1);
  table.residual.assign(4 * squares.size(), nullptr);
  for (int64_t index = squares.begin; index < squares.end; ++index) {
    const Square square = Square::of(*plan.winograd, index);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = square.row + i / 2 * plan.winograd->h.step, col = square.col + i % 2 * plan.winograd->w.step;
      if (row >= sizes.out_h || col >= sizes.out_w) continue;
      const int64_t at = 4 * (index - squares.begin) + i;
      table.outputs[at] = ((square.image * sizes.out_h + row) * sizes.out_w + col) * sizes.K;
      table.residual[at] = operands.residual_of(sizes, square.image, row, col);
    }
  }
}

// The direct sums of output i of a square at the channels [channel, channel + kLanes). Where inputs are infinite, or
// almost, the transforms make infinities that the direct sum never meets; NaN among the inputs is NaN in both.
template <typename T>
Vec<T> winograd_direct_sums(const ConvPlan& plan, const ConvOperands<T>& operands, const Square& square, int64_t i,
                            int64_t channel) {
  const int64_t depth = plan.sizes.depth;
  const WinogradGrid& grid = *plan.winograd;
  const std::vector<T> zeros(depth);
  const T* inputs[4][4];
  winograd_inputs(plan, operands.x, square, zeros.data(), inputs);
  const WeightStrides& strides = operands.weight.strides;
  T sums[kLanes<T>] = {};
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t s = 0; s < 3; ++s) {
      const T* const input = inputs[i / 2 + (grid.h.is_reversed ? 2 - r : r)][i % 2 + (grid.w.is_reversed ? 2 - s : s)];
      const T* const w = operands.weight.w + r * strides.R + s * strides.S + channel * strides.K;
      if (std::any_of(input, input + depth, [](T value) { return value != value; })) {
        return broadcast(std::numeric_limits<T>::quiet_NaN());
      }
      for (int64_t k = 0; k < std::min(kLanes<T>, plan.sizes.K - channel); ++k) {
        for (int64_t c = 0; c < depth; ++c) sums[k] += input[c] * w[k * strides.K + c * strides.C];
      }
    }
  }
  return load(sums);
}

// A^T m A of one square and `width` channels of a panel, with what follows it on the way to y. sums: those of the
// square in the tile of every frequency.
template <typename T>
void winograd_finish(const ConvPlan& plan, const ConvOperands<T>& operands, const ConvFinish<T>& finish, int64_t index,
                     const T* sums, int64_t width) {
  constexpr int64_t step = kConvTile<T>;
  for_each_vector<T>(width, [&](auto lanes, int64_t c) {
    Vec<T> rows[2][4], out[2][2];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec<T> column[2];
      winograd_output(load(sums + j * step + c), load(sums + (4 + j) * step + c), load(sums + (8 + j) * step + c),
                      load(sums + (12 + j) * step + c), column);
      rows[0][j] = column[0];
      rows[1][j] = column[1];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) winograd_output(rows[i][0], rows[i][1], rows[i][2], rows[i][3], out[i]);
    const bool are_finite = is_finite((out[0][0] + out[0][1]) + (out[1][0] + out[1][1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (finish.outputs[i] < 0) continue;
      finish(lanes, i, c,
             are_finite
                 ? out[i / 2][i % 2]
                 : winograd_direct_sums(plan, operands, Square::of(*plan.winograd, index), i, finish.channel + c));
    }
  });
}

template <typename T>
const T* winograd_panel(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t panel, ConvTable<T>& table) {
  if (operands.loose == nullptr) return operands.packed + panel * plan.panel_elements();
  table.panel.resize(plan.panel_elements());
  winograd_pack(plan, *operands.loose, panel, table.panel.data());
  return table.panel.data();
}

// The sums of the block's squares over all inputs of one frequency: sums (tiles, kFrequencies, tile).
template <typename T>
void winograd_products(const ConvPlan& plan, const ConvTable<T>& table, const Cut& tiles, int64_t frequency,
                       const T* panel, T* sums, ConvAhead<T>& ahead) {
  const int64_t depth = plan.sizes.depth;
  const T* const inputs = table.squares.data() + frequency * table.square_step;
  for (int64_t run = 0; run < plan.runs.count; ++run) {
    const Range channels = plan.runs[run];
    for (int64_t t = 0; t < tiles.count; ++t) {
      const Range points = tiles[t];
      const T* rows[kConvPoints];
      for (int64_t i = 0; i < points.size(); ++i) rows[i] = inputs + (points.begin + i) * depth;
      conv_micro_tile_of<T>(points.size())(
          rows, 1, channels.begin, channels.size(),
          panel + frequency * plan.frequency_elements() + channels.begin * kConvChannels<T>,
          sums + (t * kFrequencies + frequency) * kConvTile<T>, run == 0, nullptr, ahead.take(channels.size(), panel));
    }
  }
}

// One task of the plan: the squares of a block by its panels.
template <typename T>
void winograd_block(const ConvPlan& plan, const ConvOperands<T>& operands, int64_t task, ConvTable<T>& table) {
  const int64_t block = task / plan.panel_blocks.count;
  const Range squares = plan.point_block(block), panels = plan.panel_blocks[task % plan.panel_blocks.count];
  const Cut tiles = Cut::at_most(squares.size(), kConvPoints);
  if (block != table.block) {
    winograd_transform(plan, operands, squares, table);
    winograd_outputs(plan, operands, squares, table);
    table.block = block;
  }
  table.sums.resize(tiles.count * kFrequencies * kConvTile<T>);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const T* const panel = winograd_panel(plan, operands, p, table);
    const T* const next = panel + plan.frequency_elements();
    ConvAhead<T> ahead = operands.loose != nullptr ? conv_ahead(*operands.loose, p + 1)
                                                   : ConvAhead<T>{next, next + plan.panel_elements()};
    for (int64_t frequency = 0; frequency < kFrequencies; ++frequency) {
      winograd_products(plan, table, tiles, frequency, panel, table.sums.data(), ahead);
    }
    const int64_t channel = p * kConvChannels<T>, width = std::min(kConvChannels<T>, plan.sizes.K - channel);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const T* sums = table.sums.data() + t * kFrequencies * kConvTile<T>;
      for (int64_t i = tiles[t].begin; i < tiles[t].end; ++i, sums += kConvChannels<T>) {
        const ConvFinish<T> finish{&operands, table.outputs.data() + 4 * i, table.residual.data() + 4 * i, channel};
        winograd_finish(plan, operands, finish, squares.begin + i, sums, width);
      }
    }
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
