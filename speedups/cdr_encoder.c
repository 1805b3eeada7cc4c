/* Rows of copy_json (queries.sql) become JSON objects, the same bytes as JsonEncoder in cdr/stream.py makes, in
 * less time. That one is the reference and always there. This one is built where a C compiler and Python.h are,
 * and one build serves every Python from 3.11 on.
 *
 * A row is what COPY writes, and nothing else is known here:
 *
 *     row     = cell, { DEL, cell }, line end
 *     cell    = string | bare
 *     string  = '"', { plain | '\"' | '\\' | control character }, '"'
 *     bare    = at least one byte, none of which is DEL, '"' or a control character
 *
 * with as many cells as there are keys. If a row is anything else, the whole batch is left to the reference.
 * Strings hold what strangers chose, such as a caller's name. So the size of the answer is computed first, and
 * every write is checked against it all the same.
 */

#define Py_LIMITED_API 0x030b0000 /* 3.11 is the first whose limited API has Py_buffer */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define DEL 0x7f

/* No size is larger, so that no sum of a few of them overflows. */
#define MOST ((size_t)PY_SSIZE_T_MAX / 64)

/* UNUSUAL: the batch is left to the reference. FAILED: an exception is set. */
typedef enum { FAILED = -1, UNUSUAL, OK } Outcome;

typedef struct {
    const char *text;
    size_t size;
} Piece;

/* What a row is written with. */
typedef struct {
    Piece *keys; /* what stands before each cell */
    size_t width;
    size_t size; /* of all keys together */
    Piece first; /* what stands before the first cell of all instead of its key */
    Piece last;  /* what stands after the last */
} Frame;

typedef struct {
    const unsigned char *at, *end;
} Reader;

typedef struct {
    char *at, *end;
} Writer;


/* Bytes ---------------------------------------------------------------------- */

#define EACH_BYTE(value) (UINT64_C(0x0101010101010101) * (value))

/* Eight bytes, the first in the lowest place. */
static inline uint64_t
load_eight(const unsigned char *text)
{
    uint64_t eight;
    memcpy(&eight, text, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    return eight;
}

/* The highest bit of each byte that is below a limit, of 128 at most; above the first such bit any may be set. */
static uint64_t
find_below(uint64_t eight, unsigned char limit)
{
    return (eight - EACH_BYTE(limit)) & ~eight & EACH_BYTE(0x80);
}

static uint64_t
find_byte(uint64_t eight, unsigned char byte)
{
    return find_below(eight ^ EACH_BYTE(byte), 1);
}

static int
is_control(unsigned char byte)
{
    return byte < 0x20;
}

/* The letter of \b, \t, \n, \f and \r, or 0. */
static char
short_escape(unsigned char control)
{
    return "\0\0\0\0\0\0\0\0btn\0fr"[control < 14 ? control : 0];
}

/* By how much a text grows when its control characters are escaped: to \n, or to \u0001. */
static size_t
measure_escapes(const unsigned char *text, size_t size)
{
    size_t more = 0;
    for (size_t i = 0; i < size; i++) {
        while (size - i >= 8 && !find_below(load_eight(text + i), 0x20)) {
            i += 8;
        }
        if (i < size && is_control(text[i])) {
            more += short_escape(text[i]) ? 1 : 5;
        }
    }
    return more;
}

static int
put(Writer *to, const char *text, size_t size)
{
    if ((size_t)(to->end - to->at) < size) {
        return 0;
    }
    memcpy(to->at, text, size);
    to->at += size;
    return 1;
}

static int
put_byte(Writer *to, unsigned char byte)
{
    if (to->at == to->end) {
        return 0;
    }
    *to->at++ = (char)byte;
    return 1;
}

static int
put_escape(Writer *to, unsigned char control)
{
    static const char digits[] = "0123456789abcdef";
    char letter = short_escape(control);
    if (letter) {
        const char text[] = {'\\', letter};
        return put(to, text, sizeof text);
    }
    const char text[] = {'\\', 'u', '0', '0', digits[control >> 4], digits[control & 15]};
    return put(to, text, sizeof text);
}


/* Rows ----------------------------------------------------------------------- */

/* Copies up to eight bytes, as far as none is a control character, a quotation mark or another one that stops; 0
 * if fewer than eight may be read or written. What is written behind those that count is written over later. */
static inline size_t
copy_some(Writer *to, Reader *from, unsigned char other)
{
    if (from->end - from->at < 8 || to->end - to->at < 8) {
        return 0;
    }
    uint64_t eight = load_eight(from->at);
    uint64_t stops = find_below(eight, 0x20) | find_byte(eight, '"') | find_byte(eight, other);
    size_t count = stops ? (size_t)__builtin_ctzll(stops) / 8 : 8;
    memcpy(to->at, from->at, 8);
    to->at += count;
    from->at += count;
    return count;
}

/* Copies a string, of which the first quotation mark comes next. */
static int
copy_string(Writer *to, Reader *from)
{
    if (!put_byte(to, *from->at++)) {
        return 0;
    }
    for (;;) {
        while (copy_some(to, from, '\\') == 8) {
        }
        if (from->at == from->end) {
            return 0;
        }
        unsigned char byte = *from->at++;
        if (is_control(byte) ? !put_escape(to, byte) : !put_byte(to, byte)) {
            return 0;
        }
        if (byte == '"') {
            return 1;
        }
        if (byte == '\\') {
            if (from->at == from->end || (*from->at != '"' && *from->at != '\\') || !put_byte(to, *from->at++)) {
                return 0;
            }
        }
    }
}

/* Copies null, a number or a truth value. */
static int
copy_bare(Writer *to, Reader *from)
{
    const unsigned char *begin = from->at;
    while (copy_some(to, from, DEL) == 8) {
    }
    while (from->at < from->end && !is_control(*from->at) && *from->at != DEL && *from->at != '"') {
        if (!put_byte(to, *from->at++)) {
            return 0;
        }
    }
    return from->at > begin;
}

/* Writes the object of a row, without the brace that closes it. */
static int
write_object(Writer *to, Reader row, const Frame *frame, Piece key)
{
    for (size_t cell = 0; cell < frame->width; cell++) {
        if (cell) {
            key = frame->keys[cell];
            if (row.at == row.end || *row.at++ != DEL) {
                return 0;
            }
        }
        if (!put(to, key.text, key.size)) {
            return 0;
        }
        int is_string = row.at < row.end && *row.at == '"';
        if (is_string ? !copy_string(to, &row) : !copy_bare(to, &row)) {
            return 0;
        }
    }
    return row.at == row.end;
}


/* Batches --------------------------------------------------------------------- */

/* Does something with the bytes of a row, but for its line end. */
typedef Outcome Visit(Reader row, const Frame *frame, int is_first, void *context);

static Outcome
visit_rows(PyObject *rows, const Frame *frame, Visit *visit, void *context)
{
    Outcome outcome = OK;
    for (Py_ssize_t i = 0; outcome == OK && i < PyList_Size(rows); i++) {
        PyObject *row = Py_NewRef(PyList_GetItem(rows, i));
        Py_buffer buffer;
        if (PyObject_GetBuffer(row, &buffer, PyBUF_SIMPLE) < 0) {
            outcome = FAILED;
        }
        else {
            const unsigned char *text = buffer.buf;
            if (buffer.len < 1 || text[buffer.len - 1] != '\n') {
                outcome = UNUSUAL;
            }
            else {
                outcome = visit((Reader){text, text + buffer.len - 1}, frame, i == 0, context);
            }
            PyBuffer_Release(&buffer);
        }
        Py_DECREF(row);
    }
    return outcome;
}

/* Adds the size of a row's object. Of its delimiters, one fewer than cells, none stays. */
static Outcome
measure_row(Reader row, const Frame *frame, int is_first, void *context)
{
    size_t *size = context;
    size_t row_size = (size_t)(row.end - row.at);
    if (row_size < frame->width - 1 || row_size > MOST || *size > MOST) {
        return UNUSUAL;
    }
    *size += frame->size + row_size - (frame->width - 1) + measure_escapes(row.at, row_size);
    if (is_first) {
        *size += frame->first.size - frame->keys[0].size;
    }
    return OK;
}

static Outcome
write_row(Reader row, const Frame *frame, int is_first, void *context)
{
    return write_object(context, row, frame, is_first ? frame->first : frame->keys[0]) ? OK : UNUSUAL;
}

static PyObject *
encode_rows(PyObject *rows, const Frame *frame)
{
    size_t size = frame->last.size;
    Outcome outcome = visit_rows(rows, frame, measure_row, &size);
    PyObject *encoded = NULL;
    if (outcome == OK) {
        encoded = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
        outcome = encoded ? OK : FAILED;
    }
    if (outcome == OK) {
        char *begin = PyBytes_AsString(encoded);
        Writer to = {begin, begin + size};
        outcome = visit_rows(rows, frame, write_row, &to);
        if (outcome == OK && !(put(&to, frame->last.text, frame->last.size) && to.at == to.end)) {
            outcome = UNUSUAL;
        }
    }
    if (outcome == OK) {
        return encoded;
    }
    Py_XDECREF(encoded);
    return outcome == FAILED ? NULL : Py_NewRef(Py_None);
}


/* Python ---------------------------------------------------------------------- */

static Outcome
read_piece(PyObject *object, Piece *piece)
{
    char *text;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(object, &text, &size) < 0) {
        return FAILED;
    }
    piece->text = text;
    piece->size = (size_t)size;
    return piece->size > MOST ? UNUSUAL : OK;
}

static Outcome
read_keys(PyObject *tuple, Frame *frame)
{
    frame->width = (size_t)PyTuple_Size(tuple);
    frame->keys = PyMem_Calloc(frame->width + 1, sizeof(Piece));
    if (!frame->keys) {
        PyErr_NoMemory();
        return FAILED;
    }
    Outcome outcome = frame->width ? OK : UNUSUAL;
    for (size_t i = 0; outcome == OK && i < frame->width; i++) {
        outcome = read_piece(PyTuple_GetItem(tuple, (Py_ssize_t)i), &frame->keys[i]);
        frame->size += frame->keys[i].size;
        if (outcome == OK && frame->size > MOST) {
            outcome = UNUSUAL;
        }
    }
    return outcome;
}

PyDoc_STRVAR(encode_doc,
             "encode(rows, first, keys, last, /) -> bytes | None\n"
             "\n"
             "The objects of some rows, a list of buffers. keys, a tuple of bytes, is what stands before each cell,\n"
             "first what stands before the first cell of all instead, last what stands after the last.\n"
             "None if a row is not as COPY writes one of so many cells. Raises TypeError or BufferError for\n"
             "anything that is not of these types.");

static PyObject *
encode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *rows, *first, *keys, *last;
    if (!PyArg_ParseTuple(args, "O!SO!S:encode", &PyList_Type, &rows, &first, &PyTuple_Type, &keys, &last)) {
        return NULL;
    }
    Frame frame = {NULL, 0, 0, {NULL, 0}, {NULL, 0}};
    Outcome outcome = read_piece(first, &frame.first);
    if (outcome == OK) {
        outcome = read_piece(last, &frame.last);
    }
    if (outcome == OK) {
        outcome = read_keys(keys, &frame);
    }
    if (outcome == OK && PyList_Size(rows) == 0) {
        outcome = UNUSUAL;
    }
    PyObject *encoded = NULL;
    if (outcome == OK) {
        encoded = encode_rows(rows, &frame);
    }
    else if (outcome == UNUSUAL) {
        encoded = Py_NewRef(Py_None);
    }
    PyMem_Free(frame.keys);
    return encoded;
}

static PyMethodDef methods[] = {{"encode", encode, METH_VARARGS, encode_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "cdr_encoder",
    .m_doc = "Rows of COPY as JSON objects: speedups/cdr_encoder.c.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit_cdr_encoder(void)
{
    return PyModuleDef_Init(&definition);
}
