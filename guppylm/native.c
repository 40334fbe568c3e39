/* The model once more, in whole numbers: what native.py hands over, computed as fast as one core can.

   The same transformer as model.py's, for any number of tokens at once: `guppy_read` takes one row for each token (who it
   belongs to, where it stands) and looks back into that reply's keys and values. A prompt is many rows of one reply, a
   step of decoding one row of each.

   Weights are int8, one scale for each output; before each product a row of activations is rounded to int8, with a
   scale of its own. Sums of whole numbers have no rounding, and nothing of one row enters another: a row comes out bit
   for bit the same whatever else is read with it. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define ROWS 64 /* read at a time: four tiles of 16 rows */
#define WIDEST 4160 /* inputs of a layer; native.py checks it. No power of two, or all rows would share cache lines */
#define LONGEST 1024 /* positions */
#define NEVER -1e30f /* the compiler may take it that nothing is infinite */

/* y = x W' + b. `weight` lies as the processor wants it. With tiles: blocks of 16 outputs x 64 inputs, in each of them 4
   inputs of 16 outputs side by side. Without: output by output. Behind the last input and output there are zeros. */
typedef struct {
    int32_t inputs, outputs; /* rounded up to whole blocks */
    const int8_t *weight;
    const float *scale, *bias;
} Linear;

typedef struct {
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    Linear qkv, out, up, down;
} Block;

typedef struct {
    int32_t layers, heads, width, inner, window, slots;
    const float *tokens, *positions, *norm_weight, *norm_bias;
    const Block *blocks;
    Linear head;
    /* In bf16, for each layer, slot and head: keys (window / 16, channels / 2, 16 positions, 2 channels) and values
       (channels / 16, window / 2, 16 channels, 2 positions); numbers that do not divide are rounded up. */
    uint16_t *keys, *values;
} Model;

enum After { NOTHING, RELU, ADD };

typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));

/* 16 pairs of bf16: the first and the second of each, as floats. */
static inline void unpair(const uint16_t *pairs, Sixteen *first, Sixteen *second) {
    typedef uint32_t Bits __attribute__((vector_size(64)));
    Bits bits;
    memcpy(&bits, pairs, sizeof bits);
    *first = (Sixteen)(bits << 16);
    *second = (Sixteen)(bits & 0xffff0000u);
}

static uint16_t to_bf16(float value) {
    union { float value; uint32_t bits; } u = {value};
    return (uint16_t)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}

/* e to the power of x, for x up to 0; as exact as float is. (The library's own does one number at a time.) */
static float exponential(float x) {
    float power = fmaxf(x * 1.44269504f, -126), whole = floorf(power), part = (power - whole) * 0.693147181f;
    float fraction =
        1 + part * (1 + part * (1 / 2.f + part * (1 / 6.f + part * (1 / 24.f + part * (1 / 120.f + part * (1 / 720.f))))));
    union { uint32_t bits; float value; } two_to = {(uint32_t)((int32_t)whole + 127) << 23};
    return fraction * two_to.value;
}

static void normalise(const float *x, const float *weight, const float *bias, int width, float *y) {
    float sum = 0, squares = 0;
    for (int c = 0; c < width; c++) sum += x[c];
    float mean = sum / (float)width;
    for (int c = 0; c < width; c++) squares += (x[c] - mean) * (x[c] - mean);
    float scale = 1 / sqrtf(squares / (float)width + 1e-5f);
    for (int c = 0; c < width; c++) y[c] = (x[c] - mean) * scale * weight[c] + bias[c];
}

/* Sums of products of 16 outputs (one block column of `weight`) for up to four times 16 rows. */
static void multiply(const int8_t x[ROWS][WIDEST], const int8_t *weight, int inputs, int rows,
                     Whole sums[ROWS]) {
#ifdef __AMX_INT8__
/* Tiles 0 to 3 hold sums, 4 and 5 activations, 6 weights; their names must be plain numbers. */
#define FOUR(act) act(0, 4) if (rows > 16) { act(1, 5) } if (rows > 32) { act(2, 4) } if (rows > 48) { act(3, 5) }
#define CLEAR(t, a) _tile_zero(t);
#define DOT(t, a) _tile_loadd(a, x[16 * t] + k, WIDEST); _tile_dpbssd(t, a, 6);
#define KEEP(t, a) _tile_stored(t, &sums[16 * t], 64);
    FOUR(CLEAR)
    for (int k = 0; k < inputs; k += 64, weight += 1024) {
        for (int i = 0; i < 1024; i += 64) __builtin_prefetch(weight + 4096 + i);
        _tile_loadd(6, weight, 64);
        FOUR(DOT)
    }
    FOUR(KEEP)
#else
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < 16; o++) {
            int32_t sum = 0;
            for (int k = 0; k < inputs; k++) sum += x[r][k] * weight[(size_t)o * inputs + k];
            sums[r][o] = sum;
        }
#endif
}

/* y = x W' + b for `rows` rows; x and y lie `x_step` and `y_step` floats apart. */
static void linear(const Linear *l, const float *x, int x_step, int width, int rows, float *y, int y_step, int wanted,
                   enum After after) {
    static _Thread_local int8_t whole[ROWS][WIDEST] __attribute__((aligned(64)));
    Whole sums[ROWS];
    float scale[ROWS];
    for (int r = 0; r < rows; r++) {
        const float *row = x + (size_t)r * x_step;
        float largest = 1e-20f;
        for (int k = 0; k < width; k++) largest = fmaxf(largest, fabsf(row[k]));
        scale[r] = largest / 127;
        float inverse = 127 / largest;
        for (int k = 0; k < width; k++) whole[r][k] = (int8_t)(int32_t)rintf(row[k] * inverse);
        memset(whole[r] + width, 0, (size_t)(l->inputs - width));
    }
    for (int o = 0; o < l->outputs; o += 16) {
        multiply(whole, l->weight + (size_t)o * l->inputs, l->inputs, rows, sums);
        int end = wanted - o < 16 ? wanted - o : 16;
        Sixteen weight_scale, bias;
        memcpy(&weight_scale, l->scale + o, sizeof bias);
        memcpy(&bias, l->bias + o, sizeof bias);
        for (int r = 0; r < rows; r++) {
            float *to = y + (size_t)r * y_step + o;
            Sixteen result = __builtin_convertvector(sums[r], Sixteen) * (scale[r] * weight_scale) + bias, before = {0};
            if (after == RELU) result = (Sixteen)((Whole)result & (result > 0));
            if (after == ADD) {
                memcpy(&before, to, (size_t)end * sizeof(float));
                result += before;
            }
            memcpy(to, &result, (size_t)end * sizeof(float));
        }
    }
}

/* One head of one row looks back over `seen` positions. `channels` and `window` are even. */
static inline void look_back(const float *query, const uint16_t *keys, const uint16_t *values, int seen, int window,
                             int channels, int wanted, float *heard) {
    float weights[LONGEST + 16], scale = 1 / sqrtf((float)wanted), largest = NEVER, sum = 0;
    int whole = (seen + 15) / 16 * 16; /* whole registers */
    /* Values come from far; they are on their way while the scores are computed. */
    for (int c = 0; c < channels; c += 16)
        for (int t = 0; t < seen; t += 2) __builtin_prefetch(values + (c * window + t * 16));
    Sixteen first, second;
    for (int t = 0; t < whole; t += 16, keys += channels * 16) { /* 16 positions at a time */
        Sixteen even = {0}, odd = {0};
        for (int c = 0; c < channels; c += 2) {
            unpair(keys + c * 16, &first, &second);
            even += query[c] * first;
            odd += query[c + 1] * second;
        }
        even += odd;
        memcpy(weights + t, &even, sizeof even);
    }
    for (int t = seen; t < whole; t++) weights[t] = NEVER;
    for (int t = 0; t < whole; t++) largest = fmaxf(largest, weights[t]);
    for (int t = 0; t < whole; t++) weights[t] = exponential((weights[t] - largest) * scale);
    for (int t = seen; t < whole; t++) weights[t] = 0;
    for (int t = 0; t < whole; t++) sum += weights[t];
    for (int c = 0; c < channels; c += 16, values += window * 16) { /* 16 channels at a time */
        Sixteen even = {0}, odd = {0};
        for (int t = 0; t < seen; t += 2) {
            unpair(values + t * 16, &first, &second);
            even += weights[t] * first;
            odd += weights[t + 1] * second;
        }
        even = (even + odd) / sum;
        int end = wanted - c < 16 ? wanted - c : 16;
        memcpy(heard + c, &even, (size_t)end * sizeof(float));
    }
}

/* Every row says its keys and values and looks back. The rows of a reply come in their order, so each sees those before
   it and none behind. */
static void attend(const Model *m, int layer, int rows, const int32_t *slot, const int32_t *position, const float *qkv,
                   float *heard) {
    int width = m->width, channels = width / m->heads, paired = (channels + 1) / 2 * 2, window = (m->window + 1) / 2 * 2;
    size_t key_size = (size_t)(window + 15) / 16 * 16 * paired, value_size = (size_t)(channels + 15) / 16 * 16 * window;
    for (int r = 0; r < rows; r++) {
        size_t head = ((size_t)layer * m->slots + slot[r]) * m->heads;
        for (int h = 0, t = position[r]; h < m->heads; h++, head++) {
            const float *q = qkv + (size_t)r * 3 * width + h * channels, *k = q + width, *v = k + width;
            uint16_t *keys = m->keys + head * key_size, *values = m->values + head * value_size;
            uint16_t *key = keys + t / 16 * 16 * paired + t % 16 * 2, *value = values + t / 2 * 32 + t % 2;
            for (int c = 0; c < channels; c++) key[c / 2 * 32 + c % 2] = to_bf16(k[c]);
            for (int c = 0; c < channels; c++) value[c / 16 * 16 * window + c % 16 * 2] = to_bf16(v[c]);
            float *to = heard + (size_t)r * width + h * channels;
            if (channels == 64) look_back(q, keys, values, t + 1, window, 64, 64, to); /* a number is faster */
            else look_back(q, keys, values, t + 1, window, paired, channels, to);
        }
    }
}

/* Asks the system for tiles (AMX); call it once before anything else. 1: there are, 0: this code needs none, -1: it
   needs them and does not get them. */
int guppy_begin(void) {
#ifdef __AMX_INT8__
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 1 : -1; /* ARCH_REQ_XCOMP_PERM, the tiles' data */
#else
    return 0;
#endif
}

/* Read `rows` tokens; a reply's own ones in their order. Where `wanted` is set, the logits of what comes next go to
   `logits`, one row after the other, each `vocabulary` wide. `work` has room for ROWS rows of 5 width + inner. */
void guppy_read(const Model *m, int rows, const int32_t *ids, const int32_t *slot, const int32_t *position,
                const uint8_t *wanted, int vocabulary, float *work, float *logits) {
    int width = m->width;
    float *x = work, *y = x + ROWS * width, *qkv = y + ROWS * width, *inner = qkv + ROWS * 3 * width;
#ifdef __AMX_INT8__
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int t = 0; t < 8; t++) tiles.bytes[t] = 64, tiles.rows[t] = 16;
    _tile_loadconfig(&tiles);
#endif
    for (int begin = 0; begin < rows; begin += ROWS) {
        int n = rows - begin < ROWS ? rows - begin : ROWS;
        for (int r = 0; r < n; r++)
            for (int c = 0; c < width; c++)
                x[r * width + c] = m->tokens[(size_t)ids[begin + r] * width + c] +
                                   m->positions[(size_t)position[begin + r] * width + c];
        for (int layer = 0; layer < m->layers; layer++) {
            const Block *b = &m->blocks[layer];
            for (int r = 0; r < n; r++)
                normalise(x + r * width, b->norm1_weight, b->norm1_bias, width, y + r * width);
            linear(&b->qkv, y, width, width, n, qkv, 3 * width, 3 * width, NOTHING);
            attend(m, layer, n, slot + begin, position + begin, qkv, y);
            linear(&b->out, y, width, width, n, x, width, width, ADD);
            for (int r = 0; r < n; r++)
                normalise(x + r * width, b->norm2_weight, b->norm2_bias, width, y + r * width);
            linear(&b->up, y, width, width, n, inner, m->inner, m->inner, RELU);
            linear(&b->down, inner, m->inner, m->inner, n, x, width, width, ADD);
        }
        int asked = 0;
        for (int r = 0; r < n; r++)
            if (wanted[begin + r])
                normalise(x + r * width, m->norm_weight, m->norm_bias, width, y + asked++ * width);
        if (asked) linear(&m->head, y, width, width, asked, logits, vocabulary, vocabulary, NOTHING);
        logits += (size_t)asked * vocabulary;
    }
#ifdef __AMX_INT8__
    _tile_release();
#endif
}

typedef struct { float temperature, top_p, min_p; int32_t top_k; double draw; } Choice;

/* The next token of each row of `logits` + its row of `mask`, as engine.py's `choose` chooses it. `values` and `tokens`
   have room for a vocabulary. */
void guppy_choose(int rows, int vocabulary, const float *logits, const float *mask, const int32_t *mask_row,
                  const Choice *choices, float *values, int32_t *tokens, int32_t *chosen) {
    for (int r = 0; r < rows; r++, logits += vocabulary) {
        const float *may = mask + (size_t)mask_row[r] * vocabulary;
        Choice choice = choices[r];
        float largest = NEVER;
        for (int v = 0; v < vocabulary; v++) largest = fmaxf(largest, logits[v] + may[v]);
        /* What is less probable than min_p; a little less, for rounding. */
        float least = choice.min_p > 0 ? largest + choice.temperature * logf(choice.min_p) - 1e-3f : NEVER / 2;
        int found = 0;
        for (int v = 0; v < vocabulary; v++) {
            float value = logits[v] + may[v];
            if (value < least || (found == choice.top_k && value <= values[found - 1])) continue;
            int at = found < choice.top_k ? found++ : found - 1; /* the last one gives way; of equals, the first stays */
            for (; at > 0 && values[at - 1] < value; at--) values[at] = values[at - 1], tokens[at] = tokens[at - 1];
            values[at] = value, tokens[at] = v;
        }
        double sum = 0, before = 0;
        int allowed = 0;
        for (int i = 0; i < found; i++) {
            values[i] = exponential((values[i] - largest) / choice.temperature);
            if (values[i] < choice.min_p) found = i;
            else sum += values[i];
        }
        for (; allowed < found && before < choice.top_p * sum; allowed++) before += values[allowed];
        double pointed = choice.draw * before, end = 0;
        int index = 0;
        for (; index < allowed - 1 && (end += values[index]) <= pointed; index++) {}
        chosen[r] = tokens[index];
    }
}
