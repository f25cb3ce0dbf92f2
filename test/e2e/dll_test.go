package e2e

import "encoding/binary"

// prngDLL returns a library for 64-bit Windows that exports one function: BOOL ProcessPrng(PBYTE, SIZE_T),
// which fills memory with random bytes of the processor. Programs made by Go need it, and Wine 8 has no
// bcryptprimitives.dll. It is for tests only.
func prngDLL() []byte {
	code := []byte{
		0x48, 0x85, 0xd2, // test rdx, rdx
		0x74, 33, // jz done
		0x48, 0x0f, 0xc7, 0xf0, // next: rdrand rax
		0x73, 0xfa, // jnc next
		0x41, 0xb8, 8, 0, 0, 0, // mov r8d, 8
		0x88, 0x01, // byte: mov [rcx], al
		0x48, 0xc1, 0xe8, 0x08, // shr rax, 8
		0x48, 0xff, 0xc1, // inc rcx
		0x48, 0xff, 0xca, // dec rdx
		0x74, 7, // jz done
		0x41, 0xff, 0xc8, // dec r8d
		0x75, 0xed, // jnz byte
		0xeb, 0xdf, // jmp next
		0xb8, 1, 0, 0, 0, // done: mov eax, 1
		0xc3, // ret
	}
	const (
		rva  = 0x1000 // of the only section
		file = 0x200  // where it lies in the file
		size = 0x200
	)
	le := binary.LittleEndian
	b := make([]byte, file+size)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00")
	coff := b[0x44:]
	le.PutUint16(coff[0:], 0x8664) // x86-64
	le.PutUint16(coff[2:], 1)      // section
	le.PutUint16(coff[16:], 240)   // optional header
	le.PutUint16(coff[18:], 0x2022)
	opt := b[0x58:]
	le.PutUint16(opt[0:], 0x20b) // PE32+
	le.PutUint32(opt[4:], size)
	le.PutUint32(opt[20:], rva)
	le.PutUint64(opt[24:], 0x3_1415_0000) // image base
	le.PutUint32(opt[32:], 0x1000)        // alignment in memory
	le.PutUint32(opt[36:], 0x200)         // and in the file
	le.PutUint16(opt[40:], 6)             // Windows version
	le.PutUint16(opt[48:], 6)
	le.PutUint32(opt[56:], rva+0x1000) // size of the image
	le.PutUint32(opt[60:], file)       // and of the headers
	le.PutUint16(opt[68:], 3)          // console
	le.PutUint16(opt[70:], 0x100)      // no need to move it
	le.PutUint64(opt[72:], 1<<20)
	le.PutUint64(opt[80:], 4096)
	le.PutUint64(opt[88:], 1<<20)
	le.PutUint64(opt[96:], 4096)
	le.PutUint32(opt[108:], 16) // directories, of which the first has the exports
	const exports = 0x80
	le.PutUint32(opt[112:], rva+exports)
	le.PutUint32(opt[116:], 0x80)
	section := opt[240:]
	copy(section, ".text")
	le.PutUint32(section[8:], size)
	le.PutUint32(section[12:], rva)
	le.PutUint32(section[16:], size)
	le.PutUint32(section[20:], file)
	le.PutUint32(section[36:], 0x60000020) // code, readable

	text := b[file:]
	copy(text, code)
	dir := text[exports:]
	le.PutUint32(dir[12:], rva+0x100) // name of the library
	le.PutUint32(dir[16:], 1)         // first ordinal
	le.PutUint32(dir[20:], 1)         // functions
	le.PutUint32(dir[24:], 1)         // names
	le.PutUint32(dir[28:], rva+0xc0)
	le.PutUint32(dir[32:], rva+0xc4)
	le.PutUint32(dir[36:], rva+0xc8)
	le.PutUint32(text[0xc0:], rva)       // address of the function
	le.PutUint32(text[0xc4:], rva+0x120) // of its name
	copy(text[0x100:], "bcryptprimitives.dll\x00")
	copy(text[0x120:], "ProcessPrng\x00")
	return b
}
